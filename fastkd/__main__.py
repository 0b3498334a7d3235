"""`python -m fastkd` is the `fastkd` command: for torchrun, and where scripts are not on the path."""

import sys

from fastkd.cli import main

if __name__ == "__main__":
    sys.exit(main())
