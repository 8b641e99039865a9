"""Score answers to FLARE25 questions. See --help."""

import sys
from pathlib import Path

from qwenvl_ft.flare.score import main

if __name__ == "__main__":
    sys.exit(main(prog=Path(sys.argv[0]).name))
