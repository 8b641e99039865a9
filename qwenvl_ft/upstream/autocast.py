"""Borrowed: the place where accelerate keeps the autocast of mixed precision, the attribute ``forward`` of an instance.

`Accelerator.prepare_model` puts a wrapped ``forward`` onto the model it is given, and leaves it there after training
(accelerate 1.10, 1.12 and 1.15): every later call computes in 16 bits, whatever context it is made in. Its own
`unwrap_model(keep_fp32_wrapper=False)` goes too far: it also takes off the decorators that transformers has put around
the class's ``forward``, which rename old arguments. `forward_restored` puts back what was there. An accelerate that
wraps elsewhere, or cleans up, leaves it nothing to do.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def forward_restored(model: nn.Module) -> Iterator[None]:
    """Let a model be prepared for training inside, and call what it called before afterwards."""
    own = vars(model)
    before = own["forward"] if "forward" in own else None
    try:
        yield
    finally:
        own.pop("forward", None)
        if before is not None:
            own["forward"] = before
