"""Computes the GPU memory of a training run without a GPU, by running layers on torch's meta device.

Activations are counted as autograd saves them for the backward pass. Without an engine, trained weights, gradients and
both AdamW moments are in float32, frozen weights and activations in 16 bits. DeepSpeed keeps weights and gradients in
16 bits beside master weights and moments in float32, also 16 bytes, and divides them over the GPUs. A row that several
GPUs share is divided too.

The two kinds of layers of a Qwen3.5 are counted separately: while it is recomputed, the larger one counts. A gated
delta net saves what torch's own kernel saves, which is more than flash-linear-attention does, for a row that is one
sample. Folding (upstream/delta_net.py) a row of several samples into a rectangle adds slots without a token.

Not included: the CUDA context (about 0.5 GiB), fragmentation, and temporary results within one operation, such as the
buffers of an exchange between GPUs.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from math import lcm
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from qwenvl_ft.bench.sizes import SIZES, make_config, random_model
from qwenvl_ft.errors import BenchError, unknown_name
from qwenvl_ft.recipe.load import load_recipe
from qwenvl_ft.recipe.schema import ModelConfig
from qwenvl_ft.training.loss import HEAD_CHUNK
from qwenvl_ft.tuning.prepare import prepare_model
from qwenvl_ft.upstream.attention import set_attention

GIB = 2**30
FUSED = "meta_flash"
"""Attention that saves what a flash kernel saves: queries, keys, values, output and one number per row."""
SETTINGS = {
    "full": ("tuner.train_type=full", "tuner.freeze_vit=false", "tuner.freeze_aligner=false"),
    "lora": ("tuner.train_type=lora", "tuner.lora_rank=16", "tuner.target_parameters=[]"),
}


ENGINES = {"none": (False, False), "zero2": (False, True), "zero3": (True, True)}
"""Engine -> whether it divides weights over GPUs, and whether it divides gradients and optimizer state."""


@dataclass(frozen=True)
class Run:
    """The GPUs of a run, and what they divide."""

    engine: str = "none"
    """One of `ENGINES`."""
    gpus: int = 1
    ranks_per_row: int = 1
    """GPUs that share a row (``training.sequence_parallel_size``); divides ``gpus``."""

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise unknown_name("engine", self.engine, ENGINES)
        if self.gpus % self.ranks_per_row:
            raise BenchError(
                f"{self.gpus} GPUs cannot be divided into groups of {self.ranks_per_row} that share a row. Give "
                f"--gpus {self.ranks_per_row} or a multiple of it."
            )


ALONE = Run()


@dataclass(frozen=True)
class Memory:
    """Memory of one GPU, in GiB."""

    size: str
    train_type: str
    row_length: int
    run: Run
    weights: float
    gradients: float
    optimizer: float
    """Both moments; with an engine also the float32 master weights."""
    copies: float
    """16-bit copies of trained weights, which autocast keeps during a forward pass. With ZeRO-3, the weights that are
    gathered at a time: those of a layer and of the next one, or the embeddings."""
    checkpoints: float
    """Checkpointed input of every layer."""
    layer: float
    """Activations of one layer during recomputation, and as much for their gradients."""
    head: float
    """Logits of one chunk of supervised tokens in float32, and their gradient in 16 bits."""

    @property
    def total(self) -> float:
        return sum(value for value in asdict(self).values() if isinstance(value, float))


def memory(size: str, train_type: str, row_length: int, *, image_share: float = 0.5, run: Run = ALONE) -> Memory:
    """Compute the peak memory of a training step with gradient checkpointing.

    The frames of a row are taken to be many, so that every GPU that shares it gets as many patches.

    Raises:
        BenchError: the GPUs that share a row do not divide the attention heads.
        RecipeError: an unknown size.
    """
    config: Any = make_config(size)
    text, vision = config.text_config, config.vision_config
    if text.num_attention_heads % run.ranks_per_row:
        raise BenchError(
            f"{run.ranks_per_row} GPUs cannot share a row of {size}, which has {text.num_attention_heads} attention "
            "heads. Give a number that divides them."
        )
    model = _prepared(size, train_type)
    tokens = -(-row_length // run.ranks_per_row)
    patches = int(tokens * image_share) * vision.spatial_merge_size**2
    full, wide = train_type == "full", 4 if train_type == "full" and run.engine == "none" else 2
    held = text.num_hidden_layers * tokens * text.hidden_size * wide
    towers = list(kept_by_text_layers(model, tokens, run.ranks_per_row).values())
    if full:
        held += vision.depth * patches * vision.hidden_size * wide
        towers.append(kept_by_vision_block(model, patches))
    return Memory(
        size,
        train_type,
        row_length,
        run,
        **_of_parameters(model, run),
        checkpoints=held / GIB,
        layer=2 * max(towers) / GIB,
        head=HEAD_CHUNK * SIZES[size].vocabulary * (4 + 2) / GIB,
    )


def _of_parameters(model: nn.Module, run: Run) -> dict[str, float]:
    """Return GiB of weights, gradients, optimizer and copies."""
    trained, frozen = (sum(p.numel() for p in model.parameters() if p.requires_grad is kind) for kind in (True, False))
    if run.engine == "none":
        each = {"weights": 4 * trained + 2 * frozen, "gradients": 4 * trained, "optimizer": 8 * trained}
        return {name: held / GIB for name, held in (each | {"copies": 2 * trained}).items()}
    divides_weights, divides_state = ENGINES[run.engine]
    layers = _find(model, "language_model.layers").children()
    layer = max(sum(p.numel() for p in one.parameters()) for one in layers)
    embeddings = sum(p.numel() for p in _find(model, "embed_tokens").parameters())
    state = run.gpus if divides_state else 1
    return {
        "weights": 2 * (trained + frozen) / (run.gpus if divides_weights else 1) / GIB,
        "gradients": 2 * trained / state / GIB,
        "optimizer": 12 * trained / state / GIB,
        "copies": 2 * max(2 * layer, embeddings) / GIB if divides_weights else 0.0,
    }


@cache
def _prepared(size: str, train_type: str) -> nn.Module:
    """Return a model on the meta device as a run trains it."""
    recipe = load_recipe(None, SETTINGS[train_type])
    return prepare_model(_meta_model(size, recipe.model), recipe.tuner).to(torch.bfloat16)


def kept_by_text_layers(model: nn.Module, tokens: int, ranks_per_row: int = 1) -> dict[str, int]:
    """Return the bytes that autograd saves over ``tokens`` tokens of one GPU: kind of decoder layer -> bytes of one.

    Args:
        ranks_per_row: GPUs with as many tokens each, with which attention exchanges heads for tokens.
    """
    modules: Iterator[Any] = model.modules()
    config = next(module.config for module in modules if hasattr(module, "config")).get_text_config()
    found = {}
    for kind, number in first_layers(config).items():
        layer: Any = _find(model, f"language_model.layers.{number}")
        weight = layer.input_layernorm.weight
        hidden = weight.new_empty(1, tokens, weight.shape[0])
        width = int(config.head_dim * config.rope_parameters.get("partial_rotary_factor", 1))
        angles = weight.new_empty(1, tokens, width)
        found[kind] = kept(layer, hidden, position_embeddings=(angles, angles), ranks_per_row=ranks_per_row)
    return found


def first_layers(config: Any) -> dict[str, int]:
    """Return the kinds of decoder layers -> the number of the first layer of each."""
    kinds = getattr(config, "layer_types", None) or ["full_attention"]
    return {kind: kinds.index(kind) for kind in kinds}


def kept_by_vision_block(model: nn.Module, patches: int) -> int:
    """Return the bytes that autograd saves for a block of the vision tower over ``patches`` patches."""
    block: Any = _find(model, "visual.blocks.0")
    weight = block.norm1.weight
    angles = weight.new_empty(patches, block.attn.head_dim)
    borders = torch.tensor([0, patches], dtype=torch.int32)
    hidden = weight.new_empty(patches, weight.shape[0])
    return kept(block, hidden, cu_seqlens=borders, position_embeddings=(angles, angles))


def kept(layer: nn.Module, hidden: Tensor, **inputs: Any) -> int:
    """Return the bytes that autograd saves for a layer's backward pass, without weights; each storage counts once."""
    held = [
        p.untyped_storage() for p in layer.parameters()
    ]  # keeps their ids stable: torch reuses the object while it lives
    weights = set(map(id, held))
    packed: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        packed[id(storage)] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(hidden.requires_grad_(), **inputs)
    return sum(storage.nbytes() for key, storage in packed.items() if key not in weights)


class _Fused(torch.autograd.Function):
    """Saves the tensors that a flash kernel saves; computes nothing."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise NotImplementedError


class _Exchange(torch.autograd.Function):
    """Has the result of an exchange between GPUs, and saves nothing; computes nothing."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, heads: int, tokens: int) -> Tensor:
        return states.new_empty(states.shape[0], heads, tokens, states.shape[-1])

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise NotImplementedError


def _fused(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, ranks_per_row: int = 1, **__: Any
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: ``[B, H, T, D]`` -> ``[B, T, H, D]``."""
    if ranks_per_row == 1:
        return _Fused.apply(query, key, value).transpose(1, 2), None  # type: ignore[no-untyped-call]
    apply: Any = _Exchange.apply
    heads, tokens = query.shape[1:3]
    few = lcm(key.shape[1], ranks_per_row)  # key and value heads are repeated until the GPUs divide them
    every = [
        apply(states, count // ranks_per_row, tokens * ranks_per_row)
        for states, count in ((query, heads), (key, few), (value, few))
    ]
    out: Any = _Fused.apply(*every)  # type: ignore[no-untyped-call]
    return apply(out, heads, tokens).transpose(1, 2), None


AttentionInterface.register(FUSED, _fused)


def _meta_model(size: str, section: ModelConfig) -> Any:
    """Build a model on the meta device in 16 bits, with attention that saves what a flash kernel saves."""
    model = random_model(make_config(size), section, torch.device("meta"))
    for config in (model.config.text_config, model.config.vision_config):
        set_attention(config, FUSED)
    return model


def _find(model: nn.Module, ending: str) -> nn.Module:
    return next(module for name, module in model.named_modules() if name.endswith(ending))


__all__ = ["Memory", "Run", "kept", "memory"]
