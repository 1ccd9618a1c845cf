"""``python -m shardinit``: the command line."""

from shardinit.cli import main

if __name__ == "__main__":
    main()
