"""Sets the config of a saved model for inference, which differs from the config in training."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def cache_enabled(config: Any) -> Iterator[None]:
    """Set ``use_cache`` in a model's config while it is saved, so that the checkpoint generates with a cache.

    In training it is off: with a cache the samples of a packed row would attend to each other.
    """
    configs = list(filter(None, (config, getattr(config, "text_config", None))))
    for entry in configs:
        entry.use_cache = True
    try:
        yield
    finally:
        for entry in configs:
            entry.use_cache = False
