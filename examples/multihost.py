r"""A training job on many hosts: every process ends with its shards of the same arrays.

On one machine, four processes with two simulated CPU devices each, no service:

    python examples/multihost.py --processes 4 --devices 2

The same, asking a service (in another terminal: `shardinit serve`), by program and then
by bytes, from one server or from several in turns:

    python examples/multihost.py --processes 4 --server 127.0.0.1:50051
    python examples/multihost.py --processes 4 --server 127.0.0.1:50051 --via stream
    python examples/multihost.py --processes 4 \
        --server ipv4:127.0.0.1:50051,127.0.0.1:50052

With a checkpoint that all write, and that one process then restores alone:

    python examples/multihost.py --processes 4 --checkpoint /tmp/checkpoint

Any of these prints one root digest a process, and it is the one that a single process
prints:

    python examples/multihost.py --processes 1 --devices 8

On a cluster, start it once a host, without ``--processes`` children of its own:

    python examples/multihost.py --coordinator HOST0:8476 --processes 64 --rank $RANK

A process that is lost takes the others down within ``--timeout`` seconds: JAX's
coordination service notices, and no process waits for it in a collective for ever.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys

TINY = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 512,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}


def parse() -> argparse.Namespace:
    """What was typed."""
    parser = argparse.ArgumentParser(description="Sharded init on many hosts.")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rank", type=int, help="this process; none starts them all")
    parser.add_argument("--coordinator", help="host:port of process 0")
    parser.add_argument("--devices", type=int, default=2, help="simulated, a process")
    parser.add_argument("--server", help="target of an init service")
    parser.add_argument("--via", choices=("program", "stream"), default="program")
    parser.add_argument("--config", help="a config.json; default a tiny llama")
    parser.add_argument("--checkpoint", help="folder that all processes write to")
    parser.add_argument("--timeout", type=int, default=30, help="seconds")
    return parser.parse_args()


def start_all(options: argparse.Namespace) -> int:
    """Starts every process on this machine; the worst of their exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, __file__, *sys.argv[1:], "--coordinator", coordinator]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    environment["JAX_NUM_CPU_DEVICES"] = str(options.devices)
    environment.pop("XLA_FLAGS", None)
    jobs = [
        subprocess.Popen([*command, "--rank", str(rank)], env=environment)
        for rank in range(options.processes)
    ]
    try:
        return max((abs(job.wait()) for job in jobs), default=0)
    finally:
        for job in jobs:
            job.kill()


def run(options: argparse.Namespace) -> None:
    """One process of the job."""
    import jax

    if options.processes > 1:
        jax.distributed.initialize(
            options.coordinator,
            options.processes,
            options.rank,
            initialization_timeout=options.timeout,
            heartbeat_timeout_seconds=options.timeout,
            shutdown_timeout_seconds=options.timeout,
        )
    import shardinit
    from shardinit.models import build

    devices = jax.device_count()
    mesh = jax.make_mesh((max(devices // 4, 1), min(devices, 4)), ("data", "model"))
    rules = shardinit.AxisRules(
        [("embed", "data"), ("mlp", "model"), ("heads", "model"), ("vocab", "model")]
    )
    spec = (
        shardinit.ModelSpec.from_file(options.config)
        if options.config
        else shardinit.ModelSpec("decoder", TINY)
    )
    if options.server is None:
        params = shardinit.init(build(spec), 0, mesh=mesh, rules=rules)
    else:
        with shardinit.connect(options.server) as client:
            params = client.init(spec, 0, mesh=mesh, rules=rules, via=options.via)
    jax.block_until_ready(params)
    arrays = jax.tree.leaves(params)
    line = {
        "rank": jax.process_index(),
        "devices": jax.local_device_count(),
        "shards": sum(len(array.addressable_shards) for array in arrays),
        "bytes": sum(s.data.nbytes for a in arrays for s in a.addressable_shards),
        "root": shardinit.digest(params).root,
    }
    if options.checkpoint:
        save(params, options.checkpoint)
    sys.stdout.write(json.dumps(line) + "\n")  # one write: processes share the terminal
    sys.stdout.flush()


def save(params: object, folder: str) -> None:
    """Every process writes its own shards, with Orbax."""
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(os.path.abspath(folder), params)


def main() -> int:
    """Runs the job, or this process of it; the exit code."""
    options = parse()
    if options.rank is None and options.processes > 1:
        return start_all(options)
    if options.processes == 1:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        os.environ.setdefault("JAX_NUM_CPU_DEVICES", str(options.devices))
    run(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
