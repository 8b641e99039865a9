"""Removes the autocast wrapper that accelerate leaves in ``forward`` after mixed-precision training.

`Accelerator.prepare_model` sets a wrapped ``forward`` on the model and leaves it there after training (accelerate 1.10,
1.12 and 1.15), so every later call computes in 16 bits, in any autocast context. accelerate's own
`unwrap_model(keep_fp32_wrapper=False)` removes too much: also the decorators with which transformers wraps the class's
``forward`` to rename old arguments. `forward_restored` restores the previous attributes: ``forward``, and
``_is_accelerate_prepared``, with which the next trainer of the same model would not wrap it, and train it without
autocast. It relies on these names, and has no effect with an accelerate that wraps elsewhere or cleans up.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

ATTRIBUTES = ("forward", "_is_accelerate_prepared")


@contextmanager
def forward_restored(model: nn.Module) -> Iterator[None]:
    """On exit, restore ``forward`` as it was on entry, dropping any wrapper that accelerate set inside the context."""
    attributes = vars(model)
    before = {name: attributes[name] for name in ATTRIBUTES if name in attributes}
    try:
        yield
    finally:
        for name in ATTRIBUTES:
            attributes.pop(name, None)
        attributes.update(before)
