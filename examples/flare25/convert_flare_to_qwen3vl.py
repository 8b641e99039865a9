"""Convert FLARE25 to training records; by default the five starter sets. See --help."""

import sys
from pathlib import Path

from qwenvl_ft.flare.convert import main

if __name__ == "__main__":
    sys.exit(main(prog=Path(sys.argv[0]).name))
