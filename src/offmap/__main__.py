"""``python -m offmap``."""

import sys

from offmap.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
