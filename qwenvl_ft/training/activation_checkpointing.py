"""Sets activation checkpointing for each part of the model, and compiles its layers."""

from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel, TrainingArguments

from qwenvl_ft.errors import RecipeError
from qwenvl_ft.model.anatomy import part_of
from qwenvl_ft.model.compiled import compile_layers
from qwenvl_ft.recipe.schema import TrainingConfig
from qwenvl_ft.upstream.arguments import recomputes


def chosen_parts(section: TrainingConfig) -> dict[str, bool]:
    """Return whether the layers of ``llm`` and of ``vision`` are checkpointed, from a recipe's ``training`` section."""
    both = bool(section.arguments["activation_checkpointing"])
    parts = {"llm": section.llm_gradient_checkpointing, "vision": section.vit_gradient_checkpointing}
    return {part: both if setting is None else setting for part, setting in parts.items()}


def prepare_layers(model: nn.Module, args: TrainingArguments, parts: dict[str, bool]) -> None:
    """Limit activation checkpointing to ``parts`` and compile the layers, as far as ``args`` asks for either.

    Raises:
        RecipeError: no layer of this model can be compiled.
    """
    if recomputes(args):
        narrow_checkpointing(model, parts)
    if args.torch_compile:
        count = compile_layers(model, backend=str(args.torch_compile_backend), mode=args.torch_compile_mode)
        if count == 0:
            raise RecipeError("training.torch_compile=true: no layer of this model can be compiled. Remove it.")


def narrow_checkpointing(model: Any, parts: dict[str, bool]) -> None:
    """Turn activation checkpointing off in the layers of parts that map to False, after transformers has turned it on.

    transformers turns it on for all layers and makes the embeddings' output require a gradient, which only reentrant
    checkpointing needs: frozen layers at the bottom would be recomputed and differentiated for nothing. Without it a
    frozen tower has no graph and is computed once. Wrapped models work too.
    """
    for name, module in model.named_modules():
        if getattr(module, "gradient_checkpointing", False) and not parts.get(part_of(f"{name}."), True):
            module.gradient_checkpointing = False
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            cast(Any, module).disable_input_require_grads()
