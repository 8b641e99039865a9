"""Exact fine-tuning of Qwen3-VL on the plain Hugging Face stack.

All public names can be imported from here. Each is loaded on first use, so that ``import qwenvl_ft`` is fast.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from qwenvl_ft.train import train as train

__version__ = "0.1.0"

PUBLIC = {
    "load_recipe": "qwenvl_ft.recipe.load",
    "load_model": "qwenvl_ft.model.load",
    "load_processor": "qwenvl_ft.model.load",
    "register_dataset": "qwenvl_ft.data.sources.registry",
    "DATASETS": "qwenvl_ft.data.sources.registry",
    "load_jsonl": "qwenvl_ft.data.sources.json_files",
    "AugmentationPreprocessor": "qwenvl_ft.data.dense.preprocessor",
    "Encoder": "qwenvl_ft.data.encode.encoder",
    "QwenVLCollator": "qwenvl_ft.data.collate",
    "pack_lengths": "qwenvl_ft.data.plan.packing",
    "prepare_model": "qwenvl_ft.tuning.prepare",
    "prepare_run": "qwenvl_ft.training.prepare",
    "build_processor": "qwenvl_ft.assemble",
    "build_datasets": "qwenvl_ft.assemble",
    "build_model": "qwenvl_ft.assemble",
    "keep_float32": "qwenvl_ft.assemble",
    "build_trainer": "qwenvl_ft.training.build",
    "QwenVLTrainer": "qwenvl_ft.training.trainer",
    "train": "qwenvl_ft.train",
}
"""Public name -> module that defines it."""

if TYPE_CHECKING:
    from qwenvl_ft.assemble import build_datasets as build_datasets
    from qwenvl_ft.assemble import build_model as build_model
    from qwenvl_ft.assemble import build_processor as build_processor
    from qwenvl_ft.assemble import keep_float32 as keep_float32
    from qwenvl_ft.data.collate import QwenVLCollator as QwenVLCollator
    from qwenvl_ft.data.dense.preprocessor import AugmentationPreprocessor as AugmentationPreprocessor
    from qwenvl_ft.data.encode.encoder import Encoder as Encoder
    from qwenvl_ft.data.plan.packing import pack_lengths as pack_lengths
    from qwenvl_ft.data.sources.json_files import load_jsonl as load_jsonl
    from qwenvl_ft.data.sources.registry import DATASETS as DATASETS
    from qwenvl_ft.data.sources.registry import register_dataset as register_dataset
    from qwenvl_ft.model.load import load_model as load_model
    from qwenvl_ft.model.load import load_processor as load_processor
    from qwenvl_ft.recipe.load import load_recipe as load_recipe
    from qwenvl_ft.training.build import build_trainer as build_trainer
    from qwenvl_ft.training.prepare import prepare_run as prepare_run
    from qwenvl_ft.training.trainer import QwenVLTrainer as QwenVLTrainer
    from qwenvl_ft.tuning.prepare import prepare_model as prepare_model


def __getattr__(name: str) -> Any:
    if name not in PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *PUBLIC])


__all__ = [*PUBLIC, "__version__"]  # noqa: PLE0604
