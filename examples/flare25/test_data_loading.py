"""Check whether converted FLARE25 data can be trained on, like ``qwenvl-ft check flare25``. See --help."""

import sys

from qwenvl_ft.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["check", "flare25", *sys.argv[1:]]))
