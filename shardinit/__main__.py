"""``python -m shardinit``: the command line, and of it what needs no extra."""

from __future__ import annotations

import sys

from shardinit import doctor
from shardinit.errors import MissingFrameworkError
from shardinit.extras import needs


def main() -> None:
    """Runs the command line; with the library alone, ``doctor`` and ``--version``."""
    try:
        _run()
    except KeyboardInterrupt:  # while it was being imported
        print("interrupted. Nothing was done", file=sys.stderr)
        sys.exit(130)


def _run() -> None:
    try:
        with needs("typer", "shardinit[cli]"), needs("rich", "shardinit[cli]"):
            from shardinit import cli
    except MissingFrameworkError as error:
        if sys.argv[1:2] == ["doctor"]:
            sys.exit(doctor.main(sys.argv[2:]))
        if sys.argv[1:2] == ["--version"]:
            print(doctor.version_line())
            return
        print(f"error: the command line needs {error}", file=sys.stderr)
        sys.exit(1)
    cli.main()


if __name__ == "__main__":
    main()
