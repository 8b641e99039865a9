"""Joins transformers' warnings about modules that GaLore and APOLLO leave out into one line.

For each module whose name matches ``optim_target_modules`` and that is not a Linear layer (every norm and activation,
30 and more), transformers warns "NAME matched but ignored. ..." by the logger ``transformers.trainer_optimizer`` (the
same from 5.5 to 5.24). Inside `one_line_for_ignored_modules` these warnings are counted. In a version with another
logger or text they are printed one by one.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

LOGGER = "transformers.trainer_optimizer"
MARK = " matched but ignored."

logger = logging.getLogger(__name__)


@contextmanager
def one_line_for_ignored_modules() -> Iterator[None]:
    """Replace the warnings about single modules by one line with their number and an example."""
    ignored: list[str] = []

    def keep(record: logging.LogRecord) -> bool:
        name, found, _ = record.getMessage().partition(MARK)
        if found:
            ignored.append(name)
        return not found

    source = logging.getLogger(LOGGER)
    source.addFilter(keep)
    try:
        yield
    finally:
        source.removeFilter(keep)
        if ignored:
            logger.warning(
                "%d modules that the optimizer's target modules name are not Linear layers; their gradients are not "
                "projected, the first is %s.",
                len(ignored),
                ignored[0],
            )
