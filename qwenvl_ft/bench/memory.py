"""Computes the GPU memory of a training run without a GPU, by running layers on torch's meta device.

Activations are counted as autograd saves them for the backward pass. The sum is for one GPU without sharding: trained
weights, gradients and both AdamW moments in float32, frozen weights and activations in 16 bits. Not included: the CUDA
context (about 0.5 GiB), fragmentation, and temporary results within one operation.
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from qwenvl_ft.bench.sizes import SIZES, make_config, random_model
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


@dataclass(frozen=True)
class Memory:
    """Memory of one GPU, in GiB."""

    size: str
    train_type: str
    row_length: int
    weights: float
    gradients: float
    optimizer: float
    copies: float
    """16-bit copies of trained weights, which autocast keeps during a forward pass."""
    checkpoints: float
    """Checkpointed input of every layer."""
    layer: float
    """Activations of one layer during recomputation, and as much for their gradients."""
    head: float
    """Logits of one chunk of supervised tokens in float32, and their gradient in 16 bits."""

    @property
    def total(self) -> float:
        return sum(value for value in asdict(self).values() if isinstance(value, float))


def memory(size: str, train_type: str, row_length: int, *, image_share: float = 0.5) -> Memory:
    """Compute the peak memory of a training step with gradient checkpointing."""
    recipe = load_recipe(None, SETTINGS[train_type])
    model = prepare_model(_meta_model(size, recipe.model), recipe.tuner).to(torch.bfloat16)
    trained, frozen = (sum(p.numel() for p in model.parameters() if p.requires_grad is kind) for kind in (True, False))
    config: Any = make_config(size)
    text, vision = config.text_config, config.vision_config
    patches = int(row_length * image_share) * vision.spatial_merge_size**2
    full = train_type == "full"
    held = text.num_hidden_layers * row_length * text.hidden_size * (4 if full else 2)
    towers = [kept_by_text_layer(model, row_length)]
    if full:
        held += vision.depth * patches * vision.hidden_size * 4
        towers.append(kept_by_vision_block(model, patches))
    return Memory(
        size,
        train_type,
        row_length,
        weights=(4 * trained + 2 * frozen) / GIB,
        gradients=4 * trained / GIB,
        optimizer=8 * trained / GIB,
        copies=2 * trained / GIB,
        checkpoints=held / GIB,
        layer=2 * max(towers) / GIB,
        head=HEAD_CHUNK * SIZES[size].vocabulary * (4 + 2) / GIB,
    )


def kept_by_text_layer(model: nn.Module, tokens: int) -> int:
    """Return the bytes that autograd saves for a decoder layer over ``tokens`` tokens."""
    layer: Any = _find(model, "language_model.layers.0")
    weight = layer.input_layernorm.weight
    angles = weight.new_empty(1, tokens, layer.self_attn.head_dim)
    hidden = weight.new_empty(1, tokens, weight.shape[0])
    return kept(layer, hidden, position_embeddings=(angles, angles))


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


def _fused(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
    """Attention as transformers calls it: ``[B, H, T, D]`` -> ``[B, T, H, D]``."""
    return _Fused.apply(query, key, value).transpose(1, 2), None  # type: ignore[no-untyped-call]


AttentionInterface.register(FUSED, _fused)


def _meta_model(size: str, section: ModelConfig) -> Any:
    """Build a model on the meta device in 16 bits, with attention that saves what a flash kernel saves."""
    model = random_model(make_config(size), section, torch.device("meta"))
    for config in (model.config.text_config, model.config.vision_config):
        set_attention(config, FUSED)
    return model


def _find(model: nn.Module, ending: str) -> nn.Module:
    return next(module for name, module in model.named_modules() if name.endswith(ending))


__all__ = ["Memory", "kept", "memory"]
