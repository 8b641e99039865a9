"""Counts the matrix work that a training step needs, from which MFU follows.

Only products that the result needs are counted: not padding, not recomputation by gradient checkpointing or by
attention's backward pass, not pairs of tokens that do not attend to each other, not logits of tokens without a label,
not gradients of frozen weights. An image enters the patch embedding once, not repeated in time. A product of [m, k] and
[k, n] is 2 m n k floating-point operations.

A gated delta net is counted as its kernels compute it, in chunks of 64 tokens, each sample beginning with a chunk of
its own: pairs of tokens of a chunk, and the state that passes from a chunk to the next. The slots that folding a row
(upstream/delta_net.py) leaves empty are padding, and not counted.

Letters: L tokens of a sample, F patches of an image (or frame), K supervised tokens.
"""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from torch import nn

from qwenvl_ft.model.anatomy import canonical_name, part_of
from qwenvl_ft.upstream.delta_net import CHUNK, MIXER
from qwenvl_ft.upstream.whole import full_shape

PEAK_TFLOPS = {
    "B200": 2250.0,
    "GB200": 2500.0,
    "H200 NVL": 835.5,
    "H200": 989.4,
    "GH200": 989.4,
    "H100 NVL": 835.5,
    "H100 PCIe": 756.5,
    "H100": 989.4,
    "H800": 989.4,
    "H20": 148.0,
    "A100": 312.0,
    "A800": 312.0,
    "L40S": 362.1,
    "L4": 121.0,
    "A10G": 70.0,
    "A10": 125.0,
    "RTX A6000": 154.8,
    "RTX 5090": 209.5,
    "RTX 4090": 165.2,
    "RTX 3090": 71.2,
}
"""Part of a GPU's name -> dense 16-bit tensor peak with float32 accumulation, in TFLOP/s, from NVIDIA's data sheets."""

FLOW = (
    r"visual\.patch_embed",
    r"visual\.pos_embed",
    r"visual\.blocks\.(\d+)",
    r"visual\.(?:merger|deepstack_merger_list)",
    r"language_model\.embed_tokens",
    r"language_model\.layers\.(\d+)",
    r"language_model\.norm",
    r"lm_head",
)
"""Modules in the order of the forward pass; the captured number orders the layers."""
IN_LAYER = (
    r"(?<!linear_attn)\.(norm1?|input_layernorm)$",
    r"\.(attn\.qkv|[qkv]_proj|in_proj_\w+)(\.|$)",
    r"\.([qk]_norm|conv1d|linear_attn)$",
    r"\.linear_attn\.norm$",
    r"\.(attn\.proj|o_proj|out_proj)(\.|$)",
    r"\.(norm2|post_attention_layernorm)$",
    r"\.(linear_fc1|gate_proj|up_proj|gate|experts|shared_expert_gate)(\.|$)",
    r"\.(linear_fc2|down_proj)(\.|$)",
)
"""Modules in order within a layer or merger. Modules in one pattern have the same input."""
ATTENTION = 1
"""Index in `IN_LAYER` of queries, keys and values."""
RECURRENCE = 2
"""Index in `IN_LAYER` of what a gated delta net applies to queries, keys and values: its convolution and its decay."""


def peak_tflops(device_name: str) -> float | None:
    """Return a GPU's 16-bit peak in TFLOP/s by its name in torch; None if the table has no entry."""
    words = device_name.replace("-", " ").split()
    known = [name for name in PEAK_TFLOPS if all(word in words for word in name.split())]
    return PEAK_TFLOPS[max(known, key=len)] if known else None


@dataclass(frozen=True)
class Row:
    """Everything about a row that determines its matrix work."""

    samples: list[int]
    """L of each sample."""
    frames: list[int]
    """F of each image."""
    supervised: int
    """K of the row."""

    @property
    def tokens(self) -> int:
        return sum(self.samples)


@dataclass(frozen=True)
class Product:
    """A weight and the inputs that it is multiplied with."""

    name: str
    unit: str
    """Kind of input: every ``token``, ``supervised`` token, ``patch`` or ``merged`` patch."""
    size: float
    """Multiplications per input."""
    weight_grad: bool
    input_grad: bool
    """True if an earlier module trains, so that the input needs a gradient."""


@dataclass(frozen=True)
class Attention:
    """The two products of one attention layer."""

    unit: str
    """``token`` (causal attention within a sample) or ``patch`` (full attention within a frame)."""
    width: int
    """Heads times head size."""
    grad: bool
    """True if queries, keys or values need a gradient."""


@dataclass(frozen=True)
class Recurrence:
    """The products of one gated delta net, each of which is one sum over a chunk or the state for all heads.

    A pair of tokens of a chunk takes two products of keys, one of values and, to solve the chunk's triangular system,
    one of both. A token after the first chunk reads the state twice; one before the last chunk is added to it.
    """

    heads: int
    """Heads of values; those of queries and keys are repeated."""
    key: int
    value: int
    """Size of a head."""
    grad: bool
    """True if queries, keys, values, strengths or decays need a gradient."""

    def multiplications(self, counts: Counter[str]) -> int:
        """Return the multiplications of a forward pass."""
        pairs = (3 * self.key + 2 * self.value) * counts["chunk pair"]
        return self.heads * (pairs + self.key * self.value * (2 * counts["reader"] + counts["writer"]))


@dataclass
class Work:
    """All matrix work of a model."""

    products: list[Product] = field(default_factory=list)
    attentions: list[Attention] = field(default_factory=list)
    recurrences: list[Recurrence] = field(default_factory=list)
    merged: int = 4
    """Patches per image token of the language model."""

    def flops(self, rows: Iterable[Row]) -> dict[str, int]:
        """Return the FLOPs of forward and backward pass over rows, by kind.

        Returns:
            ``text``, ``vision``, ``head`` and the two ``attention`` s; ``delta nets`` if there are any; ``total``.
        """
        counts, pairs = _counted(rows, self.merged)
        totals: Counter[str] = Counter()
        for product in self.products:
            passes = 1 + product.weight_grad + product.input_grad
            kind = {"token": "text", "supervised": "head"}.get(product.unit, "vision")
            totals[kind] += int(2 * product.size * counts[product.unit]) * passes
        for layer in self.attentions:
            kind = "text attention" if layer.unit == "token" else "vision attention"
            totals[kind] += 4 * layer.width * pairs[layer.unit] * (3 if layer.grad else 1)
        for net in self.recurrences:
            totals["delta nets"] += 2 * net.multiplications(counts) * (3 if net.grad else 1)
        return dict(totals) | {"total": sum(totals.values())}


def _counted(rows: Iterable[Row], merged: int) -> tuple[Counter[str], Counter[str]]:
    """Count the inputs of each unit, and the pairs that attend to each other."""
    counts: Counter[str] = Counter()
    pairs: Counter[str] = Counter()
    for row in rows:
        counts["token"] += row.tokens
        counts["supervised"] += row.supervised
        counts["patch"] += sum(row.frames)
        counts["merged"] += sum(row.frames) // merged
        pairs["token"] += sum(map(_causal, row.samples))
        pairs["patch"] += sum(patches * patches for patches in row.frames)
        for length in row.samples:
            whole, rest = divmod(length - 1, CHUNK)  # the last chunk has 1 to CHUNK tokens
            counts["chunk pair"] += whole * _causal(CHUNK) + _causal(rest + 1)
            counts["reader"] += max(length - CHUNK, 0)
            counts["writer"] += whole * CHUNK
    return counts, pairs


def _causal(tokens: int) -> int:
    """Return the number of pairs of a token and itself or one before it."""
    return tokens * (tokens + 1) // 2


def model_work(model: nn.Module) -> Work:
    """Return the matrix work of a dense or MoE model, fully trained or with LoRA; weights may be on the meta device.

    A weight needs a gradient if it is trainable, an input if any earlier module is trainable.
    """
    config: Any = next(module.config for module in model.modules() if hasattr(module, "config"))
    text, vision = config.text_config, config.vision_config
    work = Work(merged=vision.spatial_merge_size**2)
    active = text.num_experts_per_tok / text.num_experts if hasattr(text, "num_experts") else 1.0
    weighted = [
        (canonical_name(name), module)
        for name, module in model.named_modules()
        if next(module.parameters(recurse=False), None) is not None
    ]
    before = False
    for place, stage in groupby(sorted(weighted, key=_entry_place), key=_entry_place):
        modules = list(stage)
        for name, module in modules:
            work.products += _products(name, module, before, active)
        before |= any(p.requires_grad for _, module in modules for p in module.parameters(recurse=False))
        names = [name for name, _ in modules]
        if place[2] == RECURRENCE and any(name.endswith(f".{MIXER}") for name in names):
            sizes = text.linear_num_value_heads, text.linear_key_head_dim, text.linear_value_head_dim
            work.recurrences.append(Recurrence(*sizes, before))
        if place[2] == ATTENTION and not any(f".{MIXER}." in name for name in names):
            unit, width = _unit(names[0]), text.num_attention_heads * text.head_dim
            work.attentions.append(Attention(unit, width if unit == "token" else vision.hidden_size, before))
    return work


def _entry_place(entry: tuple[str, nn.Module]) -> tuple[int, int, int]:
    return _place(entry[0])


def _place(name: str) -> tuple[int, int, int]:
    """Return the place of a module in the forward pass: (index in `FLOW`, layer, index in `IN_LAYER`)."""
    for stage, pattern in enumerate(FLOW):
        if found := re.search(rf"(?:^|\.){pattern}(?=\.|$)", name):
            number = int(found.group(1)) if found.groups() else 0
            inner = (i for i, ending in enumerate(IN_LAYER) if re.search(ending, name[found.start() :]))
            return stage, number, next(inner, len(IN_LAYER))
    raise AssertionError(f"{name} has weights, but its work is unknown")


def _products(name: str, module: nn.Module, before: bool, active: float) -> list[Product]:
    """Return the products of one module's own weights; none for embeddings, norms and biases.

    Args:
        active: share of the experts that a token uses.
    """
    if isinstance(module, nn.Embedding):
        return []
    products = []
    for key, weight in module.named_parameters(recurse=False):
        shape = full_shape(weight)
        if len(shape) < 2:
            continue
        size = shape.numel() * (active if ".experts" in name else 1.0)
        if len(shape) == 3:
            before |= key == "down_proj" and any(p.requires_grad for p in module.parameters())
        if len(shape) == 5:  # patch embedding over space and time
            size /= shape[2]
        after_a = ".lora_B." in name and weight.requires_grad
        products.append(Product(f"{name}.{key}", _unit(name), size, weight.requires_grad, before or after_a))
    return products


def _unit(name: str) -> str:
    if re.search(r"(^|\.)lm_head", name):
        return "supervised"
    return {"llm": "token", "vision": "patch", "merger": "merged"}[part_of(name)]
