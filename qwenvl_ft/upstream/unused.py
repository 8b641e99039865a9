"""Borrowed: how accelerate, transformers and peft ask whether a package is installed, so that what is unused stays out.

accelerate imports deepspeed wherever it is installed to save a model, and peft from 0.20 on bitsandbytes to be imported
itself; both take seconds and print of compilers and libraries that nobody asked for. All of them ask
`importlib.util.find_spec` or try the import (accelerate 1.0 to 1.15, transformers 5.5 to 5.24, peft 0.18 to 0.21), and
Python says that a package whose entry in ``sys.modules`` is None is neither found nor imported.

A release that asks in another way imports the package again: slower, and right. bitsandbytes is in
`qwenvl_ft.upstream.peft`, which remembers more.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

ASK_ONCE = {"deepspeed": ("accelerate", "transformers.integrations.deepspeed")}
"""Package -> modules that ask for it when they are imported, and never again."""


@contextmanager
def unused(*packages: str) -> Iterator[None]:
    """Inside, packages count as not installed, unless they are in use already."""
    hidden = [name for name in packages if name not in sys.modules]
    for name in hidden:
        for asker in ASK_ONCE[name] if name in ASK_ONCE else ():
            import_module(asker)
    hidden = [name for name in hidden if name not in sys.modules]
    for name in hidden:
        sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]
