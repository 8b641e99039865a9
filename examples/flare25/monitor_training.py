"""Monitor a training run. See --help."""

import sys

from qwenvl_ft.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["monitor", *sys.argv[1:]]))
