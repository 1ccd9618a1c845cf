"""Unrolled threefry against JAX's own ``random_bits`` on chips that are not there.

    pip install 'shardinit[cuda12]'
    python benchmarks/rounds.py gpu:h100:1x8

The engine writes threefry's rounds out; ``jax.random.bits`` leaves them to XLA, which
on CPU keeps a loop. Here both are compiled for the same shard of a normal matrix: what
each materialises, holds and moves.
"""

import os
import sys
from collections import Counter

from shardinit.verify.audit import topology as topologies


def init(key):
    """65,536 x 8,192 float32."""
    import jax

    return jax.random.normal(key, (1 << 16, 1 << 13))


def main(name: str) -> None:
    """Prints a line for each way."""
    wanted = topologies.topology(name)
    os.environ.update(topologies.environment(wanted, os.environ))  # before JAX
    import jax
    import numpy as np

    import shardinit
    from shardinit.core.run.lower import lower
    from shardinit.verify.audit import hlo

    mesh = jax.sharding.Mesh(np.asarray(topologies.devices(wanted)), ("device",))
    (program,) = shardinit.plan(init, mesh=mesh).programs
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    words = jax.ShapeDtypeStruct((2,), np.uint32, sharding=whole)
    plain = jax.jit(
        lambda words: init(jax.random.wrap_key_data(words)),
        out_shardings=program.shardings[0],
    )
    for way, lowered in [
        ("unrolled", lower(program, program.shardings)),
        ("random_bits", plain.lower(words)),
    ]:
        compiled = lowered.compile()
        module = hlo.parse(compiled.as_text())
        values = Counter(line.opcode for line, _, _ in module.materialised())
        temporaries = compiled.memory_analysis().temp_size_in_bytes
        print(
            f"{way}: {module.loops()} loops, {dict(values)}, temporaries "
            f"{temporaries:,} bytes, moved {module.bytes_moved():,} bytes"
        )


if __name__ == "__main__":
    main(sys.argv[1])
