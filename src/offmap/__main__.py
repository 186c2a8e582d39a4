"""The command ``offmap``, and ``python -m offmap``."""

import gc
import sys


def main() -> int:
    """Run the command line. Return the exit status.

    What the imports make stays: to look for garbage in it takes a millisecond. `offmap.cli.main` enables it again.
    """
    gc.disable()
    from offmap.cli.entry import run

    return run(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
