"""A child process: one run of one side, and nothing else.

Called as ``python -m shardinit.bench.child CASE SIDE PARAMETERS OUT``, with the
parameters as JSON and ``OUT`` the file for the figures. Where memory runs out, Linux is
told to end this process rather than any other.
"""

from __future__ import annotations

import importlib
import json
import sys
from contextlib import suppress
from pathlib import Path

from shardinit.bench import case as cases
from shardinit.core.platform import peak_bytes


def main() -> None:
    """Runs the side that the arguments name and writes its figures."""
    name, side, parameters, out = sys.argv[1:]
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    run = cases.load()[name].sides[side]
    importlib.import_module("shardinit.core.run.compile")  # JAX and the engine
    imports = peak_bytes()
    figures = run(**json.loads(parameters))
    figures.setdefault("peak_bytes", peak_bytes())
    Path(out).write_text(json.dumps({**figures, "imports_bytes": imports}))


if __name__ == "__main__":
    main()
