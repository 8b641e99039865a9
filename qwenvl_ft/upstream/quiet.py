"""Keeps progress bars and notices of other libraries from standing between a run's own lines.

Relies on:

- ``disable_progress_bar``, ``enable_progress_bar`` and ``is_progress_bar_enabled`` of ``transformers.utils.logging``,
  and ``are_progress_bars_disabled`` and ``enable_progress_bars`` of ``huggingface_hub.utils``: public, transformers 5.5
  to 5.24. The bars of downloads stay.
- The names of loggers and the beginnings of their messages (`NOTICES`): transformers 5.5 to 5.24, DeepSpeed 0.16 to
  0.19, bitsandbytes 0.50. If one is renamed, its line is shown.
- The beginnings of warnings (`WARNINGS`): transformers 5.24, in the property that peft reads. Likewise.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

NOTICES = {
    "transformers.trainer_utils": (
        "The tokenizer has new PAD/BOS/EOS tokens that differ from the model config",
        "mtime may not be reliable on this filesystem",
    ),
    "DeepSpeed": ("Setting ds_accelerator to", "Setting accelerator to CPU"),
    "bitsandbytes.backends.cpu.ops": ("Failed to load CPU gemm_4bit_forward",),  # on import, used or not
}
"""Logger -> the beginnings of the messages that say nothing to the user of a run."""
WARNINGS = ("`is_gradient_checkpointing` is deprecated",)
"""The beginnings of warnings that address the authors of a library."""


class _Unwanted(logging.Filter):
    """Drops messages that begin in one of several ways."""

    def __init__(self, beginnings: tuple[str, ...]) -> None:
        super().__init__()
        self.beginnings = beginnings

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(self.beginnings)


@contextmanager
def without_notices() -> Iterator[None]:
    """Hide `NOTICES` and `WARNINGS` inside the context."""
    filters = {name: _Unwanted(beginnings) for name, beginnings in NOTICES.items()}
    for name, unwanted in filters.items():
        logging.getLogger(name).addFilter(unwanted)
    try:
        with warnings.catch_warnings():
            for beginning in WARNINGS:
                warnings.filterwarnings("ignore", message=beginning)
            yield
    finally:
        for name, unwanted in filters.items():
            logging.getLogger(name).removeFilter(unwanted)


@contextmanager
def quiet() -> Iterator[None]:
    """Hide bars like "Loading weights", `NOTICES` and `WARNINGS` inside the context."""
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging as transformers_logging

    bars, downloads = transformers_logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
    transformers_logging.disable_progress_bar()
    if downloads:
        enable_progress_bars()
    try:
        with without_notices():
            yield
    finally:
        if bars and downloads:
            transformers_logging.enable_progress_bar()
