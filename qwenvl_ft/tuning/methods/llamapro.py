"""LLaMA Pro (Wu and others 2024, arXiv 2401.02415): adds new blocks to the language model and trains only those.

The layers are divided into as many groups as there are new blocks, and a copy of each group's last layer is inserted
after it. The weights that write to the residual stream (``o_proj`` and the MLP's ``down_proj``) are zero in the copy,
so it is the identity, and the larger model gives the same outputs as the original. The result is a plain model with
more layers: config.json holds their number, and the indices of the new ones under ``llamapro_new_blocks``.

The features of the deepstack mergers are added after the first layers. No block is inserted between those, so each
feature keeps its layer, in plain transformers too.
"""

from __future__ import annotations

import copy
import re
from typing import TYPE_CHECKING, Any

import torch

from qwenvl_ft.errors import RecipeError
from qwenvl_ft.tuning.freeze_flags import require_language_model_only
from qwenvl_ft.tuning.targets import inside, saved_modules
from qwenvl_ft.upstream.whole import require_whole_weights

if TYPE_CHECKING:
    from torch import nn

    from qwenvl_ft.recipe.schema import TunerConfig

MARK = "llamapro_new_blocks"
"""Key in config.json that holds the indices of the new blocks."""


def build_llamapro(model: Any, tuner: TunerConfig) -> nn.Module:
    """Add the blocks, unless the model has them already, and make only them and ``modules_to_save`` trainable.

    Names in ``modules_to_save`` are those of the larger model.

    Raises:
        RecipeError: the model was expanded by a different number of blocks, the recipe has keys that the method
            cannot use, or ZeRO-3 has sharded the weights to copy.
    """
    require_language_model_only(tuner)
    count = tuner.llamapro_num_new_blocks
    known = new_blocks(model)
    if known and len(known) != count:
        raise RecipeError(
            f"tuner.llamapro_num_new_blocks={count}, but the model has {len(known)} new blocks from an earlier run. "
            f"Set it to {len(known)}, or start from the model without them."
        )
    if not known:
        require_whole_weights(model, "train_type=llamapro with new blocks")
        expand(model, count)
    trainable = _trainable_modules(model, tuner)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(inside(name, trainable))
    return model


def new_blocks(model: Any) -> list[int]:
    """Return the indices of the new blocks; empty for a model without any."""
    return list(getattr(model.config, MARK)) if hasattr(model.config, MARK) else []


WRITES = re.compile(r"^(self_attn\.o_proj|linear_attn\.out_proj|mlp\.(.+\.)?down_proj)\b")
"""Matches the parameters of a decoder layer whose products are added to the residual stream."""


def insertion_points(model: Any, count: int) -> list[int]:
    """Return, for each new block, how many of the model's layers lie below it.

    Example:
        36 layers and 4 blocks: 9, 18, 27, 36. 4 layers of which 3 take a deepstack feature: 3, 3, 3, 4.
    """
    layers = len(model.model.language_model.layers)
    vision = model.config.vision_config
    lowest = len(vision.deepstack_visual_indexes) if hasattr(vision, "deepstack_visual_indexes") else 0
    return [max((group + 1) * layers // count, lowest, 1) for group in range(count)]


def expand(model: Any, count: int) -> None:
    """Insert ``count`` identity blocks into the language model, and record them in its config."""
    text, config = model.model.language_model, model.config.get_text_config()
    points = insertion_points(model, count)
    layers: list[Any] = []
    origins: list[int] = []
    added: list[int] = []
    for below, layer in enumerate(text.layers, 1):
        layers.append(layer)
        origins.append(below - 1)
        for _ in range(points.count(below)):
            added.append(len(layers))
            layers.append(_identity_block(layer))
            origins.append(below - 1)
    text.layers = type(text.layers)(layers)
    for index, layer in enumerate(layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = index
    config.num_hidden_layers = len(layers)
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = [config.layer_types[origin] for origin in origins]
    if getattr(config, "mlp_only_layers", None):
        dense = set(config.mlp_only_layers)
        config.mlp_only_layers = [index for index, origin in enumerate(origins) if origin in dense]
    setattr(model.config, MARK, added)


def check_llamapro(model: Any, tuner: TunerConfig) -> None:
    """Raise RecipeError if a weight outside of the new blocks and ``modules_to_save`` is trainable."""
    trainable = _trainable_modules(model, tuner)
    others = [name for name, value in model.named_parameters() if value.requires_grad and not inside(name, trainable)]
    if others:
        raise RecipeError(
            f"tuner.train_type=llamapro, but {len(others)} weights outside of the new blocks would train, the first is "
            f"{others[0]}. Call prepare_model(model, recipe.tuner) and pass its result to the trainer."
        )


def _trainable_modules(model: Any, tuner: TunerConfig) -> list[str]:
    return [f"model.language_model.layers.{index}" for index in new_blocks(model)] + saved_modules(model, tuner)


def _identity_block(layer: nn.Module) -> nn.Module:
    """Copy a decoder layer and zero the weights that write to the residual stream."""
    block = copy.deepcopy(layer)
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            if WRITES.search(name):
                parameter.zero_()
    return block
