"""Keeps accelerate, transformers and peft from importing optional packages that the run does not use.

accelerate imports deepspeed, if it is installed, to save a model; peft imports bitsandbytes since 0.20 when it is
imported itself. Both take seconds and print warnings about compilers and libraries. Relies on the way in which the
three check for a package: they call `importlib.util.find_spec` or try the import (accelerate 1.0 to 1.15, transformers
5.5 to 5.24, peft 0.18 to 0.21), and Python neither finds nor imports a package whose entry in ``sys.modules`` is None.

A release that checks in another way imports the package again, which is slower but correct. bitsandbytes is handled in
`qwenvl_ft.upstream.peft`, because peft caches the answer.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

ASK_ONCE = {"deepspeed": ("accelerate", "transformers.integrations.deepspeed")}
"""Package -> modules that check for it once, when they are imported."""


@contextmanager
def unused(*packages: str) -> Iterator[None]:
    """Make packages count as not installed inside this context, unless they are imported already."""
    hidden = [name for name in packages if name not in sys.modules]
    for name in hidden:
        for module in ASK_ONCE[name] if name in ASK_ONCE else ():
            import_module(module)
    hidden = [name for name in hidden if name not in sys.modules]
    for name in hidden:
        sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]
