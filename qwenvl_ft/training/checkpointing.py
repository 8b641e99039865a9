"""Which layers forget their activations and compute them again in the backward pass.

transformers turns it on for all layers of the model and lets the embeddings' output require a gradient, which only the
reentrant kind needs: layers at the bottom that are frozen would be computed again, and back, for nothing.
"""

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from qwenvl_ft.model.anatomy import part_of


def chosen_parts(training: Any) -> dict[str, bool]:
    """``llm`` and ``vision`` -> whether their layers are recomputed, from a recipe's ``training`` section."""
    both = bool(training.arguments["activation_checkpointing"])
    told = {"llm": training.llm_gradient_checkpointing, "vision": training.vit_gradient_checkpointing}
    return {part: both if own is None else own for part, own in told.items()}


def narrow_checkpointing(model: nn.Module, parts: dict[str, bool]) -> None:
    """Leave it on for the layers of these parts only, once transformers has turned it on; wrappers are looked through.

    A frozen tower has no graph at all then, and is computed once.
    """
    for name, module in model.named_modules():
        if getattr(module, "gradient_checkpointing", False) and not parts.get(part_of(f"{name}."), True):
            module.gradient_checkpointing = False  # type: ignore[assignment]
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.disable_input_require_grads()
