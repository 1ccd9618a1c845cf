"""Compiles every program of a model for TPUs that are not there.

    pip install 'shardinit[tpu]'
    python benchmarks/deviceless.py v5p:16x16x16 llama-3.1-405b

libtpu's compiler needs no chip. For each distinct program at its sharding this prints
the bytes of a device's shard, of the compiled output (padded to the chip's layout) and
of its temporaries, and the collectives in the compiled code; it ends with status 1
when there is a collective, or temporaries beyond 1 MiB plus a tenth of the shard.
"""

import math
import os
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5p-8")

import jax
import numpy as np
from jax.experimental import topologies

import shardinit
from shardinit.core.compiled import lower
from shardinit.core.plan import itemsize
from shardinit.models import ModelSpec, build, example_config

COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute")


def main(topology: str, model: str) -> int:
    """Prints a row for each program; returns the exit status."""
    jax.devices()  # the CPU backend comes first, or the topology is refused
    chips = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    devices = np.asarray(chips.devices)
    wide = 2 ** (int(math.log2(devices.size)) // 2)
    mesh = jax.sharding.Mesh(devices.reshape(-1, wide), ("data", "model"))
    plan = shardinit.plan(build(ModelSpec("decoder", example_config(model))), mesh=mesh)
    print(plan.summary())
    failed = False
    for number, program in enumerate(plan.programs):
        first = next(leaf for leaf in plan.leaves if leaf.program == number)
        compiled = lower(program, program.shardings).compile()
        memory, text = compiled.memory_analysis(), compiled.as_text()
        shard = math.prod(program.shardings[0].shard_shape(first.shape))
        shard *= itemsize(first.dtype)
        found = [name for name in COLLECTIVES if name in text]
        bad = bool(found) or memory.temp_size_in_bytes > (1 << 20) + shard // 10
        failed |= bad
        print(
            f"{first.path}: {program.leaves} leaves, shard {shard:,} bytes, output "
            f"{memory.output_size_in_bytes:,}, temporaries "
            f"{memory.temp_size_in_bytes:,}, collectives {found or 'none'}"
            + (" FAILED" if bad else "")
        )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
