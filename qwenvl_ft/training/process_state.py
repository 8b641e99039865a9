"""What does a run change in its process? `restored_process` sets it back, so that runs in one process are independent.

A notebook, or a script with several recipes, calls `qwenvl_ft.train` again and again. Each call must train what it
would train in a process of its own, and must leave the caller's settings alone.
"""

import gc
import logging
import os
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import AttentionInterface
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging as transformers_logging

from qwenvl_ft.data.readers import READERS, import_reader
from qwenvl_ft.data.sources.registry import DATASETS
from qwenvl_ft.upstream.processes import accelerate_restorer, recompile_limit, set_recompile_limit

Restore = Callable[[], Any]

SETTINGS: tuple[tuple[Callable[[], Any], Callable[[Any], Any]], ...] = (
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.is_grad_enabled, torch.set_grad_enabled),
    (torch.get_num_threads, torch.set_num_threads),
    (torch.is_anomaly_enabled, torch.set_anomaly_enabled),
    (torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode),
    (torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.enable_flash_sdp),
    (torch.backends.cuda.mem_efficient_sdp_enabled, torch.backends.cuda.enable_mem_efficient_sdp),
    (torch.backends.cuda.math_sdp_enabled, torch.backends.cuda.enable_math_sdp),
    (torch.backends.cuda.cudnn_sdp_enabled, torch.backends.cuda.enable_cudnn_sdp),
    (recompile_limit, set_recompile_limit),
    (random.getstate, random.setstate),
    (np.random.get_state, np.random.set_state),
    (torch.get_rng_state, torch.set_rng_state),
)
"""Pairs of functions that read and set one setting of torch, or a random state."""
FLAGS = ("cudnn.enabled", "cudnn.benchmark", "cudnn.deterministic")
"""Attributes of torch.backends."""
PRECISIONS = tuple(
    f"{unit}fp32_precision"
    for unit in ("", "cuda.matmul.", "cudnn.", "cudnn.conv.", "cudnn.rnn.", "mkldnn.", "mkldnn.matmul.", "mkldnn.conv.")
)
"""Attributes of torch.backends since torch 2.9, each before those that take its value."""
OLD_PRECISIONS = ("cuda.matmul.allow_tf32", "cudnn.allow_tf32")
"""The same before torch 2.9."""
TRACKERS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "wandb": (lambda wandb: wandb.run, lambda wandb: wandb.finish()),
    "swanlab": (lambda swanlab: swanlab.get_run(), lambda swanlab: swanlab.finish()),
    "comet_ml": (lambda comet: comet.get_running_experiment(), lambda comet: comet.end()),
}
"""Tracker that goes on after training -> how to get its current run, and how to end it: the next run's steps begin at 0
again. transformers ends the runs of the others."""


@contextmanager
def restored_process() -> Iterator[None]:
    """Set back at the end of the context what a run inside it changes in this process.

    The process group of several ranks stays, because another run of the same ranks needs it. Peak memory is counted
    from the beginning of the context.
    """
    if _cuda_runs():
        torch.cuda.reset_peak_memory_stats()
    with ExitStack() as stack:
        for restore in _restorers():
            stack.callback(restore)
        stack.enter_context(warnings.catch_warnings())
        stack.callback(_release)
        trackers = _tracker_runs()
        try:
            yield
        finally:
            for name, run in _tracker_runs().items():
                if run is not None and run is not trackers.get(name):
                    TRACKERS[name][1](sys.modules[name])


def _restorers() -> Iterator[Restore]:
    """Yield functions that restore what they find now; they are called in reverse order."""
    yield partial(_restore_environment, dict(os.environ))
    yield partial(sys.path.__setitem__, slice(None), list(sys.path))
    for registry in (DATASETS, READERS):
        yield partial(_restore_registry, registry, dict(registry))
    yield import_reader.cache_clear  # it finds modules by the working directory and sys.path of its first call
    yield partial(_restore_levels, {logger: logger.level for logger in _loggers()})
    yield partial(_show_progress, transformers_logging.is_progress_bar_enabled())
    yield accelerate_restorer()
    yield partial(_restore_attention, {name: ALL_ATTENTION_FUNCTIONS[name] for name in ALL_ATTENTION_FUNCTIONS})
    for read, write in SETTINGS:
        yield partial(write, read())
    if _cuda_runs():
        yield partial(torch.cuda.set_rng_state_all, torch.cuda.get_rng_state_all())
    yield partial(_restore_flags, _flags())


def _cuda_runs() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def _release() -> None:
    """Free what cycles of references hold: the model, DeepSpeed's settings, dataloader workers."""
    unset_hf_deepspeed_config()  # type: ignore[no-untyped-call]
    gc.collect()
    if _cuda_runs():
        torch.cuda.empty_cache()


def _restore_environment(before: dict[str, str]) -> None:
    """Change only what differs, because other threads read the environment too."""
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update({name: value for name, value in before.items() if os.environ.get(name) != value})


def _restore_registry(current: dict[str, Any], before: dict[str, Any]) -> None:
    """Restore the entries and their order, in which readers are tried."""
    current.clear()
    current.update(before)


def _loggers() -> Iterator[logging.Logger]:
    known = [logging.getLogger(), *logging.root.manager.loggerDict.values()]
    return (logger for logger in known if isinstance(logger, logging.Logger))


def _restore_levels(levels: dict[logging.Logger, int]) -> None:
    for logger, level in levels.items():
        if logger.level != level:
            logger.setLevel(level)


def _show_progress(shown: bool) -> None:
    if shown != transformers_logging.is_progress_bar_enabled():
        switch: Any = transformers_logging.enable_progress_bar if shown else transformers_logging.disable_progress_bar
        switch()


def _restore_attention(functions: dict[str, Any]) -> None:
    for name, function in functions.items():
        if ALL_ATTENTION_FUNCTIONS[name] is not function:
            AttentionInterface.register(name, function)


def _flags() -> dict[str, Any]:
    """Return the values of `FLAGS` and of the precisions that this torch has; reading the others would raise."""
    precisions = PRECISIONS if hasattr(torch.backends, "fp32_precision") else OLD_PRECISIONS
    found = {}
    for name in (*FLAGS, *precisions):
        owner, attribute = _owner(name)
        if owner is not None and hasattr(owner, attribute):
            found[name] = getattr(owner, attribute)
    return found


def _restore_flags(before: dict[str, Any]) -> None:
    for name, value in before.items():
        owner, attribute = _owner(name)
        if getattr(owner, attribute) != value:
            setattr(owner, attribute, value)


def _owner(name: str) -> tuple[Any, str]:
    """Return the module of torch.backends that holds an attribute (None if there is none), and its name there."""
    *path, attribute = name.split(".")
    owner: Any = torch.backends
    for part in path:
        owner = getattr(owner, part, None)
    return owner, attribute


def _tracker_runs() -> dict[str, Any]:
    """Return the current run of each tracker that is imported."""
    return {name: get(sys.modules[name]) for name, (get, _) in TRACKERS.items() if sys.modules.get(name) is not None}
