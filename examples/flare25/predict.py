"""Answer FLARE25 questions with a trained model. See --help."""

import sys
from pathlib import Path

from qwenvl_ft.flare.predict import main

if __name__ == "__main__":
    sys.exit(main(prog=Path(sys.argv[0]).name))
