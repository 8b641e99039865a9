"""Shared parts of the FLARE commands: their common options, and errors on one line instead of a traceback."""

import argparse
import sys
from collections.abc import Callable

from qwenvl_ft.data.media.images import MediaPolicy
from qwenvl_ft.errors import QwenVLError
from qwenvl_ft.flare.catalog import read_catalog
from qwenvl_ft.recipe.image_keys import METHODS


def add_data_options(parser: argparse.ArgumentParser, *, input_help: str, datasets: bool = True) -> None:
    """Add ``--input_dir`` and ``--catalog``, and ``--datasets`` if asked for."""
    if datasets:
        parser.add_argument("--datasets", nargs="+", default=["starter"], metavar="NAME", help="names, starter or all")
    parser.add_argument("--input_dir", "--base_dir", metavar="DIR", help=input_help)
    parser.add_argument("--catalog", metavar="FILE", help="YAML of more data sets: name -> category, task_types")


def add_image_limit(parser: argparse.ArgumentParser) -> None:
    """Add ``--max_image_pixels``."""
    limit = MediaPolicy.max_image_pixels
    parser.add_argument(
        "--max_image_pixels",
        type=_pixels,
        default=limit,
        metavar="PIXELS",
        help=f"largest image file that is opened, as data.max_image_pixels in a recipe (default: {limit})",
    )


def _pixels(text: str) -> int:
    """Return a number of pixels, 1 or more, of a command line."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of pixels, 1 or more")
    return int(text)


def run_command(command: Callable[[argparse.Namespace], int], arguments: argparse.Namespace) -> int:
    """Register the data sets of ``--catalog`` and run a command.

    Returns:
        The command's exit code, or 2 after a user's error, which is printed on stderr.
    """
    try:
        if "catalog" in arguments and arguments.catalog:
            read_catalog(arguments.catalog)
        return command(arguments)
    except QwenVLError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def add_reading_options(options: argparse.ArgumentParser, *, default: str) -> None:
    """Add the flags that say how images deeper than 8 bits are converted.

    Args:
        default: what happens without them, for the help.
    """
    help_text = f"image values deeper than 8 bits: {', '.join(METHODS)} (default: {default})"
    options.add_argument("--high_bit_depth", choices=METHODS, help=help_text)
    options.add_argument("--window", nargs=2, type=float, metavar=("LOW", "HIGH"), help="values for black and white")
