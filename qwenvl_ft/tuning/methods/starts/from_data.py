"""Initialisations of LoRA that look at batches: LoRA-GA (arXiv 2407.05000) and EVA (arXiv 2410.07170)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from qwenvl_ft.data.collate import ASIDE
from qwenvl_ft.data.conversation import IGNORE
from qwenvl_ft.errors import RecipeError
from qwenvl_ft.upstream.peft import public

if TYPE_CHECKING:
    from peft import LoraConfig

    from qwenvl_ft.recipe.schema import TunerConfig

GA_SCALES = {"gd": "gd_scale", "unit": "unit", "stable": "stable", "weightS": "weight_svd"}
"""Value of ``tuner.lora_ga_scale`` -> peft's name for it."""
EVA_ROUNDS = 20
"""EVA is given up after this many passes over its batches."""


def ga_settings(tuner: TunerConfig) -> dict[str, Any]:
    """Return the fields of LoraConfig for LoRA-GA."""
    scale: Any = GA_SCALES[tuner.lora_ga_scale]
    config_class = public("LoraGAConfig", "tuner.init_weights=lora-ga", "lora-ga")
    config = config_class(tuner.lora_ga_direction, scale, tuner.lora_ga_stable_gamma)
    return {"init_lora_weights": "lora_ga", "lora_ga_config": config}


def ga_gradients(model: nn.Module, config: LoraConfig, batches: Sequence[dict[str, Any]]) -> None:
    """Let peft collect each target's mean gradient over the batches; a batch's loss is its supervised tokens' mean."""
    preprocess: Any = public("preprocess_loraga", "tuner.init_weights=lora-ga", "lora-ga")

    def run_batches() -> None:
        for batch in batches:
            inputs = _on_device(batch, model)
            targets = inputs.pop("labels")[0, 1:]
            kept = (targets != IGNORE).nonzero(as_tuple=True)[0]
            logits = model(**inputs, logits_to_keep=kept).logits[0].float()
            nn.functional.cross_entropy(logits, targets[kept]).backward()

    with warnings.catch_warnings():  # the first layers' inputs rightly have no gradient, and torch warns about it
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        preprocess(model, config, run_batches)


def eva_settings(tuner: TunerConfig) -> dict[str, Any]:
    """Return the fields of LoraConfig for EVA.

    Raises:
        RecipeError: ``eva_rho`` below 1.
    """
    from peft import EvaConfig

    if tuner.eva_rho < 1:
        raise RecipeError(f"tuner.eva_rho={tuner.eva_rho} is below 1. Use 1 to give all layers the same rank, or more.")
    return {"init_lora_weights": "eva", "eva_config": EvaConfig(rho=tuner.eva_rho)}


def initialize_eva(wrapped: Any, batches: Sequence[dict[str, Any]]) -> Any:
    """Initialise A with the principal directions of each layer's inputs, and return the PeftModel.

    Ranks go to the layers whose inputs those directions explain best.

    Raises:
        RecipeError: the directions did not converge within ``EVA_ROUNDS`` passes over the batches.
    """
    from peft import initialize_lora_eva_weights

    calls = 0

    def forward(model: nn.Module, batch: dict[str, Any]) -> Any:
        nonlocal calls
        calls += 1
        if calls > EVA_ROUNDS * len(batches) + 1:
            raise RecipeError(
                f"tuner.init_weights=eva did not converge in {EVA_ROUNDS} rounds over {len(batches)} batches. Raise "
                "tuner.eva_batch_size, or lower tuner.lora_rank or eva_rho: a layer needs more tokens than ranks."
            )
        return model(**{key: value for key, value in batch.items() if key != "labels"})

    initialize_lora_eva_weights(
        wrapped,
        [_on_device(batch, wrapped) for batch in batches],
        forward_fn=forward,
        prepare_model_inputs_fn=lambda inputs, config: None,
        prepare_layer_inputs_fn=lambda states, inputs, name: _flat_inputs(states),
        gather_distributed_inputs=False,  # every rank sees the same batches
        show_progress_bar=False,
    )
    return wrapped


def _flat_inputs(states: Any) -> Tensor:
    """Return a layer's inputs as ``[tokens, features]``, for text and vision layers alike."""
    first = states if isinstance(states, Tensor) else states[0]
    return first.reshape(-1, first.shape[-1])


def _on_device(batch: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    device = next(model.parameters()).device
    moved = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
    return {key: value for key, value in moved.items() if key == "labels" or key not in ASIDE}
