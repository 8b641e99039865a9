"""``python -m qwenvl_ft.train``, which accelerate and torchrun start in every process."""

import sys

from qwenvl_ft.train import main

if __name__ == "__main__":
    sys.exit(main())
