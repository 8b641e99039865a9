"""Reads a LoRA adapter with any settings as plain pairs of matrices, and writes pairs in the form that an engine reads.

Engines differ in the settings that they know. SGLang computes lora_alpha / r for every layer, whatever use_rslora,
rank_pattern and alpha_pattern say. A plain adapter has one rank and a scaling of 1, which all of them read alike: its
lora_B includes the scaling, and smaller ranks are filled with zeros.

The experts of a layer are one tensor, to which peft adds the updates of ``target_parameters``. Two forms are in use:

| form | names after ``mlp.`` | shapes | read by |
|---|---|---|---|
| stacked | experts.base_layer (gate_up_proj), experts (down_proj) | [E r, in], [out, r E] | peft, vLLM |
| per_expert | experts.0.gate_proj, experts.0.up_proj, experts.0.down_proj | [r, in], [out, r] | SGLang |

E: experts, r: rank, in and out: sizes of one expert's matrix. The stacked rows of lora_A are ordered by expert, then by
rank; the columns of lora_B by rank, then by expert.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwenvl_ft.errors import CheckpointError

NAME = re.compile(r"^base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight$")
EXPERTS = re.compile(r"\.mlp\.experts(\.base_layer)*$")
TIED_COPY = (".embed_tokens.base_layer.weight", "lm_head.base_layer.weight")
"""Ends of names of the base model's own weights, which peft saves beside an adapted embedding or head."""
EXPERT_WEIGHTS = ("gate_up_proj", "down_proj")
TOGETHER = (
    ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    ("mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
    ("linear_attn.in_proj_qkv.weight", "linear_attn.in_proj_z.weight"),
)
"""Ends of names of weights that engines join. A part without an update gets one of zeros: SGLang would leave out the
others or fail, and vLLM fails for experts, and for in_proj_z alone."""


@dataclass(frozen=True)
class Pair:
    """The update ``up @ down`` of one weight."""

    down: Tensor
    """float32[r, in]; of experts float32[E, r, in]."""
    up: Tensor
    """float32[out, r]; of experts float32[E, out, r]. It includes the scaling."""

    @property
    def rank(self) -> int:
        return self.down.shape[-2]

    def padded(self, rank: int) -> Pair:
        """Return the same update with a larger rank."""
        more = rank - self.rank
        down = torch.nn.functional.pad(self.down, (0, 0, 0, more))
        return replace(self, down=down, up=torch.nn.functional.pad(self.up, (0, more)))


@dataclass(frozen=True)
class PlainLora:
    """All updates of an adapter."""

    config: dict[str, Any]
    """``adapter_config.json`` as saved."""
    pairs: dict[str, Pair]
    """Name of a released model's weight -> its update."""
    dtype: torch.dtype
    """Of the saved tensors."""


def read_config(folder: Path) -> dict[str, Any]:
    """Return the contents of ``adapter_config.json``."""
    config: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    return config


def read_plain(folder: Path, shapes: dict[str, tuple[int, ...]]) -> PlainLora:
    """Read a LoRA adapter.

    Args:
        shapes: name -> shape of the released base model's weights; experts are [E, in, out].

    Raises:
        CheckpointError: it holds more than pairs of LoRA (see `not_plain`), or does not fit the base model.
    """
    from safetensors.torch import load_file

    config, saved = read_config(folder), load_file(str(folder / "adapter_model.safetensors"))
    if reasons := not_plain(config, list(saved)):
        raise CheckpointError(f"{folder} is not a plain LoRA adapter: {'; '.join(reasons)}.")
    sides: dict[str, dict[str, Tensor]] = {}
    for name, value in saved.items():
        if match := NAME.match(name):
            sides.setdefault(match["module"], {})[match["side"]] = value
    pairs = {}
    for module, both in sides.items():
        if set(both) != {"A", "B"}:
            raise CheckpointError(f"{folder} is damaged: {module} has no lora_{'B' if 'A' in both else 'A'}.")
        try:
            weight, pair = _pair(module, both["A"].float(), both["B"].float(), shapes)
        except (KeyError, RuntimeError) as error:
            raise CheckpointError(f"{folder}: {module} does not fit the base model: {error}") from error
        pairs[weight] = replace(pair, up=pair.up * scaling(config, weight, pair.rank))
    return PlainLora(config, pairs, next(iter(saved.values())).dtype)


def not_plain(config: dict[str, Any], names: list[str]) -> list[str]:
    """Return why an adapter is more than pairs of matrices that are added to weights; empty if it is not.

    Args:
        names: of the saved tensors.
    """
    kind = str(config["peft_type"])
    if kind != "LORA":
        return [f"its method is {kind}, not LoRA"]
    reasons = []
    if config.get("use_dora"):
        reasons.append("use_dora rescales the base model's weights")
    others = [name for name in names if not NAME.match(name) and not name.endswith(TIED_COPY)]
    if others:
        reasons.append(f"{len(others)} tensors are trained in full or belong to no LoRA pair, the first is {others[0]}")
    return reasons


def scaling(config: dict[str, Any], weight: str, rank: int) -> float:
    """Return what peft multiplies the update of a weight with."""
    from qwenvl_ft.upstream.peft import pattern_of

    patterns = config.get("alpha_pattern") or {}
    name = weight.removesuffix(".weight")
    alpha = {name: config["lora_alpha"], **patterns}[pattern_of(patterns, name)]
    return float(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def plain_shapes(shapes: dict[str, tuple[int, ...]], *, turned: bool) -> dict[str, tuple[int, ...]]:
    """Return shapes of released weights with those of experts as [E, in, out].

    Args:
        turned: True if the family stores its experts so; others store them as [E, out, in].
    """
    if turned:
        return shapes
    return {
        name: (shape[0], shape[2], shape[1]) if name.endswith(EXPERT_WEIGHTS) and len(shape) == 3 else shape
        for name, shape in shapes.items()
    }


def completed(pairs: dict[str, Pair], shapes: dict[str, tuple[int, ...]]) -> dict[str, Pair]:
    """Return the pairs with updates of zeros for weights that engines join with updated ones."""
    result = dict(pairs)
    for name in pairs:
        group = next((group for group in TOGETHER if name.endswith(group)), ())
        layer = next((name.removesuffix(end) for end in group if name.endswith(end)), "")
        for other in (layer + end for end in group):
            if other not in result:
                *experts, outer, inner = shapes[other]
                if experts:
                    outer, inner = inner, outer
                rank = pairs[name].rank
                result[other] = Pair(torch.zeros(*experts, rank, inner), torch.zeros(*experts, outer, rank))
    return result


def write_plain(lora: PlainLora, folder: Path, form: str) -> int:
    """Write an adapter with one rank and a scaling of 1, and return its rank.

    Args:
        form: ``stacked`` or ``per_expert``, the form of experts.
    """
    from safetensors.torch import save_file

    rank = max(pair.rank for pair in lora.pairs.values())
    saved: dict[str, Tensor] = {}
    for weight, pair in lora.pairs.items():
        for module, down, up in FORMS[form](weight, pair.padded(rank)):
            for side, value in (("A", down), ("B", up)):
                saved[f"base_model.model.{module}.lora_{side}.weight"] = value.to(lora.dtype).contiguous().clone()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(saved, str(folder / "adapter_model.safetensors"), metadata={"format": "pt"})
    config = lora.config | _plain_settings(rank) | _targets(lora, form)
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return rank


def _pair(module: str, a: Tensor, b: Tensor, shapes: dict[str, tuple[int, ...]]) -> tuple[str, Pair]:
    """Return the weight that a saved pair updates, and the pair without scaling."""
    if not EXPERTS.search(module):
        outer, inner = shapes[f"{module}.weight"]
        if (b.shape[0], a.shape[1]) != (outer, inner):
            raise KeyError(f"its update has shape {b.shape[0], a.shape[1]}, the weight {outer, inner}")
        return f"{module}.weight", Pair(a, b)
    layer = EXPERTS.sub(".mlp.experts", module)
    for weight in (f"{layer}.{end}" for end in EXPERT_WEIGHTS):
        count, inner, outer = shapes[weight]
        if (a.shape[1], b.shape[0]) == (inner, outer):
            down, up = a.reshape(count, -1, inner), b.reshape(outer, -1, count).permute(2, 0, 1)
            return weight, Pair(down, up)
        if (a.shape[1], b.shape[0]) == (outer, inner):  # peft up to 0.20 takes [E, out, in] for [E, in, out]
            up, down = a.reshape(count, -1, outer).permute(0, 2, 1), b.reshape(inner, -1, count).permute(2, 1, 0)
            return weight, Pair(down, up)
    raise KeyError(f"its update has sizes {a.shape[1]} and {b.shape[0]}, which no weight of its experts has")


def _stacked(weight: str, pair: Pair) -> list[tuple[str, Tensor, Tensor]]:
    if pair.down.ndim == 2:
        return [(weight.removesuffix(".weight"), pair.down, pair.up)]
    experts, _, end = weight.rpartition(".")
    module = f"{experts}.base_layer" if end == "gate_up_proj" else experts
    return [(module, pair.down.flatten(0, 1), pair.up.permute(1, 2, 0).flatten(1))]


def _per_expert(weight: str, pair: Pair) -> list[tuple[str, Tensor, Tensor]]:
    if pair.down.ndim == 2:
        return [(weight.removesuffix(".weight"), pair.down, pair.up)]
    experts, _, end = weight.rpartition(".")
    written = []
    for number, (down, up) in enumerate(zip(pair.down, pair.up, strict=True)):
        halves = up.chunk(2) if end == "gate_up_proj" else (up,)
        ends = ("gate_proj", "up_proj") if end == "gate_up_proj" else ("down_proj",)
        written += [(f"{experts}.{number}.{name}", down, half) for name, half in zip(ends, halves, strict=True)]
    return written


FORMS = {"stacked": _stacked, "per_expert": _per_expert}
"""Name of a form -> function from a weight and its update to (module, lora_A, lora_B) as they are saved."""


def _plain_settings(rank: int) -> dict[str, Any]:
    return {
        "r": rank,
        "lora_alpha": rank,
        "use_rslora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "lora_dropout": 0.0,
        "bias": "none",
        "init_lora_weights": True,
        **dict.fromkeys(("modules_to_save", "exclude_modules", "layers_to_transform", "layers_pattern")),
        "inference_mode": True,
    }


def _targets(lora: PlainLora, form: str) -> dict[str, Any]:
    """Return the names of adapted weights: in full for peft and vLLM, the last part alone for SGLang."""
    linear = sorted(weight.removesuffix(".weight") for weight, pair in lora.pairs.items() if pair.down.ndim == 2)
    experts = sorted((weight for weight, pair in lora.pairs.items() if pair.down.ndim == 3), key=_natural)
    if form == "stacked":
        return {"target_modules": linear, "target_parameters": experts or None}
    ends = {name.rpartition(".")[2] for name in linear} | ({"gate_proj", "up_proj", "down_proj"} if experts else set())
    return {"target_modules": sorted(ends), "target_parameters": None}


def _natural(weight: str) -> tuple[str, bool]:
    """Sort gate_up_proj before down_proj, as peft nests their updates."""
    layer, _, end = weight.rpartition(".")
    return layer, end == "down_proj"
