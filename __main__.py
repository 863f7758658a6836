"""``python -m rehead`` is the command line, for environments whose scripts are not on the PATH."""

from rehead.cli import main

if __name__ == "__main__":
    main()
