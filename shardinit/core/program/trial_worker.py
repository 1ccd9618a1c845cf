"""The process in which a stranger's program is tried, and which it may end.

Called as ``python -m shardinit.core.program.trial_worker``, with the program's bytes on
standard input; what is wrong with it comes as JSON on standard output.
"""

from __future__ import annotations

import json
import sys

import jax

from shardinit.core.cut.cut import Cut
from shardinit.core.cut.leaf_program import Kind
from shardinit.core.cut.sources import Table
from shardinit.core.plan.leaves import gather_results
from shardinit.core.program.program import InitProgram
from shardinit.core.run.lazy import executable
from shardinit.errors import ShardinitError


def compile_all(cut: Cut) -> None:
    """Compiles every function once, for its smallest window."""
    device = jax.local_devices()[0]
    for leaf in cut.leaves:
        if isinstance(leaf.source, Table):
            executable(leaf.source.program, (leaf.shape,), device)
    done: set[int] = set()
    for group in gather_results(cut):
        number = cut.run_of(group[0]).program
        program, shapes = cut.programs[number], [cut.leaves[i].shape for i in group]
        if number not in done:
            if program.kind is Kind.WINDOWED:
                shapes = [tuple(min(n, 1) for n in shape) for shape in shapes]
            executable(program, tuple(shapes), device)
            done.add(number)


def main() -> None:
    """Tries the program on standard input."""
    try:
        compile_all(InitProgram.from_bytes(sys.stdin.buffer.read()).as_cut())
    except ShardinitError as error:
        print(json.dumps([error.where, error.got, error.expected, error.remedy]))
        sys.exit(1)


if __name__ == "__main__":
    main()
