"""Is the converted data fit to train on? The same as ``qwenvl-ft check flare25``; see --help."""

import sys

from qwenvl_ft.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["check", "flare25", *sys.argv[1:]]))
