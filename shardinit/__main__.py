"""``python -m shardinit``: the command line, and of it what needs no extra."""

from __future__ import annotations

import sys

from shardinit import doctor
from shardinit.errors import MissingFrameworkError
from shardinit.extras import needs


def main() -> None:
    """Runs the command line; ``doctor`` with the library alone, too."""
    try:
        with needs("typer", "shardinit[cli]"), needs("rich", "shardinit[cli]"):
            from shardinit import cli
    except MissingFrameworkError as error:
        if sys.argv[1:2] == ["doctor"]:
            sys.exit(doctor.main(sys.argv[2:]))
        print(f"error: the command line needs {error}", file=sys.stderr)
        sys.exit(1)
    cli.main()


if __name__ == "__main__":
    main()
