"""The command ``offmap``, and ``python -m offmap``."""

import gc
import sys


def main() -> int:
    """Run the command line. Return the exit status.

    What the imports make stays: to look for garbage in it takes a millisecond. `offmap.cli.main` enables it again.
    """
    gc.disable()
    from offmap.cli.main import main as run_command_line

    return run_command_line()


if __name__ == "__main__":
    sys.exit(main())
