"""The command `kvgauge`, as `python -m kvgauge`."""

import sys

from kvgauge.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
