"""Quantises the language model of a 16-bit model by GPTQ or AWQ, for serving and for LoRA on top of it.

    qwenvl-ft merge output/my_run small --quant-method gptq --quant-bits 4 --dataset my.jsonl

gptqmodel rounds each layer so that its outputs for a few calibration samples change least (arXiv 2210.17323,
2306.00978). The samples should resemble those that the model will serve. Vision tower, aligner, embeddings and language
head are not quantised.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from qwenvl_ft.data.conversation import Conversation, Image, Text, Video
from qwenvl_ft.data.media.images import MediaPolicy, open_image
from qwenvl_ft.data.media.reading import REFUSING, Reading, saved_reading
from qwenvl_ft.data.readers import read_record
from qwenvl_ft.data.sources.key_rules import KEEP_TRUE, KeyRules
from qwenvl_ft.data.sources.records import load_records
from qwenvl_ft.errors import CheckpointError, DataError, RecipeError, unknown_name
from qwenvl_ft.model.load import load_processor
from qwenvl_ft.model.quantization import INSTALL
from qwenvl_ft.model.source import load_config

logger = logging.getLogger(__name__)

BITS = {"gptq": (2, 3, 4, 8), "awq": (4,)}
"""Method -> numbers of bits that it supports."""
AWQ_BLOCK = 64
"""Number of outputs that gptqmodel's AWQ kernels take at a time."""
UNTOUCHED = ["model.visual", "visual", "lm_head"]
"""Modules that are not quantised. transformers matches them at the beginning of a name, other readers anywhere."""


def check_quantization(method: str, bits: int, dataset: str | None) -> None:
    """Check the options before anything is merged or loaded.

    Raises:
        RecipeError: an unknown method, an unsupported number of bits, no data, or gptqmodel is not installed.
    """
    if method not in BITS:
        raise unknown_name("--quant-method", method, BITS)
    if bits not in BITS[method]:
        known = ", ".join(map(str, BITS[method]))
        raise RecipeError(f"--quant-bits={bits} is not supported by --quant-method={method}. Known: {known}.")
    if not dataset:
        raise RecipeError(
            f"--quant-method={method} needs calibration samples that resemble those to be served. Pass them: --dataset "
            "my.jsonl."
        )
    if find_spec("gptqmodel") is None:
        raise RecipeError(f"--quant-method={method} needs gptqmodel. Run {INSTALL}.")


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
    ignored_keys: Sequence[str] = (),
) -> None:
    """Write a quantised model, with its processor, to a new folder.

    Args:
        model: folder of a whole model.
        group_size: number of weights in a row that share a scale.
        dataset: calibration samples, in the form of ``data.train``; those with videos are skipped.
        n_samples: number of samples, drawn at random by the seed.
        ignored_keys: keys of records that are taken as absent, as in ``data.ignored_keys``.

    Raises:
        RecipeError: see `check_quantization`, or a size that does not fit the model's layers.
        DataError: there is no usable record.
    """
    check_quantization(method, bits, dataset)
    _require_whole_groups(str(model), group_size)
    if method == "awq":
        _require_awq_outputs(str(model))
    samples = calibration(dataset, n_samples, seed, ignored_keys, saved_reading(load_processor(model)))
    # By its own default, gptqmodel 7.7 fails on two cores.
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(max(2, (os.cpu_count() or 1) // 2)))
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
    written.pop("use_cache", None)  # gptqmodel writes false
    if method == "awq":  # else transformers looks for packed weights in the vision tower
        written["quantization_config"]["modules_to_not_convert"] = UNTOUCHED
    (partial / "config.json").write_text(json.dumps(written, indent=2), encoding="utf-8")
    if out.exists():
        out.rmdir()
    partial.rename(out)


def calibration(
    dataset: str, count: int, seed: int, ignored_keys: Sequence[str] = (), reading: Reading = REFUSING
) -> list[list[dict[str, Any]]]:
    """Draw calibration samples: messages in the form of chat templates, with opened images.

    Records whose label is false are left out.

    Raises:
        DataError: every record has a video, or a record cannot be read.
    """
    records = load_records(dataset, seed=seed, rules=KeyRules(tuple(ignored_keys), KEEP_TRUE))
    policy = MediaPolicy(reading=reading)
    chosen: list[list[dict[str, Any]]] = []
    skipped = 0
    for index in np.random.default_rng(seed).permutation(len(records)).tolist():
        conversation = read_record(*records[index])
        if conversation.media(Video):
            skipped += 1
        elif len(chosen) < count:
            chosen.append(_messages(conversation, policy))
    if not chosen:
        raise DataError(f"{dataset} has only records with videos, but calibration needs text and images only.")
    if len(chosen) < count:
        logger.warning("calibrating on %d samples: %s has no more (%d with videos)", len(chosen), dataset, skipped)
    return chosen


def _messages(conversation: Conversation, policy: MediaPolicy) -> list[dict[str, Any]]:
    def content(part: Any) -> dict[str, Any]:
        if isinstance(part, Text):
            return {"type": "text", "text": part.text}
        assert isinstance(part, Image)
        return {"type": "image", "image": open_image(part.value, policy)}

    return [
        {"role": message.role, "content": [content(part) for part in message.content]}
        for message in conversation.messages
    ]


def _norms_first(tree: list[Any]) -> None:
    """Move the norms of attention before its projections in gptqmodel's module tree, as in its tree for Qwen3.

    For Qwen3-VL, gptqmodel 7.7 lists them after the projections, takes the query's norm for the MLP's input, and fails
    on its size.
    """
    layer = tree[-1]
    layer["self_attn"] = tuple(sorted(layer["self_attn"], key=lambda name: "norm" not in name))


def _require_whole_groups(model: str, group_size: int) -> None:
    """Raise RecipeError if the group size does not divide the width of every layer."""
    text: Any = load_config(model).get_text_config()
    inner = getattr(text, "moe_intermediate_size", None) or text.intermediate_size
    widths = {"hidden_size": text.hidden_size, "intermediate_size": inner}
    widths["heads"] = text.num_attention_heads * text.head_dim
    for name, width in widths.items():
        if group_size < 1 or width % group_size:
            raise RecipeError(
                f"--group-size={group_size} does not divide the model's {name} of {width}. Use a divisor, such as 32."
            )


def _require_awq_outputs(model: str) -> None:
    """Raise RecipeError if a layer's outputs do not fill AWQ's blocks; gptqmodel fails with a bare AssertionError."""
    text: Any = load_config(model).get_text_config()
    inner = getattr(text, "moe_intermediate_size", None) or text.intermediate_size
    outputs = {
        "key and value heads": text.num_key_value_heads * text.head_dim,
        "query heads": text.num_attention_heads * text.head_dim,
        "hidden_size": text.hidden_size,
        "intermediate_size": inner,
    }
    for name, width in outputs.items():
        if width % AWQ_BLOCK:
            raise RecipeError(
                f"--quant-method=awq takes outputs in blocks of {AWQ_BLOCK}, but the model's {name} have {width} "
                "outputs. Use --quant-method=gptq."
            )


def require_no_quantization(model: str) -> None:
    """Raise CheckpointError for a model that is quantised already."""
    if getattr(load_config(model), "quantization_config", None) is not None:
        raise CheckpointError(f"{model} is quantised already. Pass the model that it was quantised from.")
