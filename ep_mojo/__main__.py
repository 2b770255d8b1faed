"""`python -m ep_mojo`: the same as the `ep-mojo` command."""

import sys

from ep_mojo.cli import main

if __name__ == "__main__":
    sys.exit(main())
