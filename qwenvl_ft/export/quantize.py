"""A model in 16 bits -> its language model in few bits, by GPTQ or AWQ, for serving and for LoRA over it.

    qwenvl-ft merge output/my_run small --quant-method gptq --quant-bits 4 --dataset my.jsonl

gptqmodel does it (arXiv 2210.17323, 2306.00978): each layer is rounded so that its outputs for a few real samples
change least. The samples should be like those that are asked later. Vision tower, aligner, embeddings and head stay as
they are.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from qwenvl_ft.data.conversation import Conversation, Image, Text, Video
from qwenvl_ft.data.media.images import MediaPolicy, open_image
from qwenvl_ft.data.readers import read_record
from qwenvl_ft.data.sources.records import load_records
from qwenvl_ft.errors import CheckpointError, DataError, RecipeError, unknown_name
from qwenvl_ft.model.load import load_config
from qwenvl_ft.model.quantization import INSTALL

logger = logging.getLogger(__name__)

BITS = {"gptq": (2, 3, 4, 8), "awq": (4,)}
"""Method -> bits it can write."""
UNTOUCHED = ["model.visual", "visual", "lm_head"]
"""What stays as it is: transformers matches names from their beginning, other readers anywhere."""


def check_quantization(method: str, bits: int, dataset: str | None) -> None:
    """Refuse what cannot be done, before anything is merged or loaded.

    Raises:
        RecipeError: an unknown method, bits it does not have, no data, or gptqmodel is not installed.
    """
    if method not in BITS:
        raise unknown_name("--quant-method", method, BITS)
    if bits not in BITS[method]:
        known = ", ".join(map(str, BITS[method]))
        raise RecipeError(f"--quant-bits={bits} is nothing that --quant-method={method} writes. Known: {known}.")
    if not dataset:
        raise RecipeError(
            f"--quant-method={method} calibrates on samples like those that will be asked. Give them: --dataset "
            "my.jsonl."
        )
    if find_spec("gptqmodel") is None:
        raise RecipeError(f"--quant-method={method} needs gptqmodel. Install it by {INSTALL}.")


def quantize(
    model: str | Path,
    out: Path,
    *,
    method: str,
    bits: int = 4,
    group_size: int = 128,
    dataset: str,
    n_samples: int = 128,
    seed: int = 0,
) -> None:
    """Write a quantised model, with its processor, into a new folder.

    Args:
        model: a whole model's folder.
        group_size: weights of a row that share a scale.
        dataset: samples to calibrate on, as ``data.train``; those with videos are passed over.
        n_samples: how many of them, drawn by the seed.

    Raises:
        RecipeError: see `check_quantization`, or a group size that does not divide a layer's width.
        DataError: there is no usable record.
    """
    check_quantization(method, bits, dataset)
    _require_whole_groups(str(model), group_size)
    samples = calibration(dataset, n_samples, seed)
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(max(2, (os.cpu_count() or 1) // 2)))  # 7.7 fails on two cores
    from gptqmodel import GPTQModel  # type: ignore[import-not-found]
    from gptqmodel.quantization import AWQConfig, GPTQConfig  # type: ignore[import-not-found]

    if method == "awq":
        from gptqmodel.models.definitions.qwen3_vl import (  # type: ignore[import-not-found]
            Qwen3_VL_MoeQModel,
            Qwen3_VLQModel,
        )

        for known in (Qwen3_VLQModel, Qwen3_VL_MoeQModel):
            _norms_first(known.module_tree)
    config = {"gptq": GPTQConfig, "awq": AWQConfig}[method](bits=bits, group_size=group_size)
    loaded = GPTQModel.load(str(model), config)
    loaded.quantize(samples, batch_size=1)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    loaded.save(str(partial))
    written = json.loads((partial / "config.json").read_text(encoding="utf-8"))
    written.pop("use_cache", None)  # gptqmodel leaves it off
    if method == "awq":  # else transformers looks for packed weights in the vision tower
        written["quantization_config"]["modules_to_not_convert"] = UNTOUCHED
    (partial / "config.json").write_text(json.dumps(written, indent=2), encoding="utf-8")
    if out.exists():
        out.rmdir()
    partial.rename(out)


def calibration(dataset: str, count: int, seed: int) -> list[list[dict[str, Any]]]:
    """Conversations as chat templates take them, with opened images.

    Raises:
        DataError: there is none, or a record cannot be read.
    """
    records, policy = load_records(dataset, seed=seed), MediaPolicy()
    chosen: list[list[dict[str, Any]]] = []
    passed = 0
    for index in np.random.default_rng(seed).permutation(len(records)).tolist():
        told = read_record(*records[index])
        if told.media(Video):
            passed += 1
        elif len(chosen) < count:
            chosen.append(_messages(told, policy))
    if not chosen:
        raise DataError(f"{dataset} has no record without video, and calibration takes text and images.")
    if len(chosen) < count:
        logger.warning("calibrating on %d samples: %s has no more (%d with videos)", len(chosen), dataset, passed)
    return chosen


def _messages(told: Conversation, policy: MediaPolicy) -> list[dict[str, Any]]:
    def content(part: Any) -> dict[str, Any]:
        if isinstance(part, Text):
            return {"type": "text", "text": part.text}
        assert isinstance(part, Image)
        return {"type": "image", "image": open_image(part.value, policy)}

    return [{"role": message.role, "content": [content(part) for part in message.content]} for message in told.messages]


def _norms_first(tree: list[Any]) -> None:
    """Let attention's own norms stand before its projections, as gptqmodel has them for Qwen3.

    For Qwen3-VL it has them behind (7.7), takes the query's norm for what feeds the MLP, and fails on its size.
    """
    layer = tree[-1]
    layer["self_attn"] = tuple(sorted(layer["self_attn"], key=lambda name: "norm" not in name))


def _require_whole_groups(model: str, group_size: int) -> None:
    text: Any = load_config(model).get_text_config()
    inner = getattr(text, "moe_intermediate_size", None) or text.intermediate_size
    widths = {"hidden_size": text.hidden_size, "intermediate_size": inner}
    widths["heads"] = text.num_attention_heads * text.head_dim
    for name, width in widths.items():
        if group_size < 1 or width % group_size:
            raise RecipeError(
                f"--group-size={group_size} does not divide the model's {name} of {width}. Give a divisor, as 32."
            )


def require_no_quantization(model: str) -> None:
    """Raises CheckpointError for a model that is quantised already."""
    if getattr(load_config(model), "quantization_config", None) is not None:
        raise CheckpointError(f"{model} is quantised already. Give the model that it was made from.")
