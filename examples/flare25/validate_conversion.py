"""Check converted FLARE25 files before training. See --help."""

import sys
from pathlib import Path

from qwenvl_ft.flare.validate import main

if __name__ == "__main__":
    sys.exit(main(prog=Path(sys.argv[0]).name))
