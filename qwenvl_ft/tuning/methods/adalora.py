"""AdaLoRA (Zhang and others 2023, arXiv 2303.10512), by peft: prunes the least important ranks during training.

peft leaves three steps to the training loop. `AdaLoraPeftModel` does them when the trainer calls it: set the length of
the run, add the orthogonality term to the loss, and prune ranks after each optimizer step. A checkpoint holds the ranks
that are not zero, as peft's own checkpoints do, and ``adalora_state.safetensors`` with all rows and the importance
scores so far, so that a resumed run prunes as an uninterrupted one does.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qwenvl_ft.errors import RecipeError
from qwenvl_ft.tuning.methods.lora import place, wrap
from qwenvl_ft.tuning.methods.trained import TrainedPeftModel
from qwenvl_ft.upstream.adalora_ranks import RANKS, count_trained_ranks, freeze_rank_numbers, memory_of
from qwenvl_ft.upstream.whole import require_whole_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qwenvl_ft.recipe.schema import TunerConfig

STATE = "adalora_state.safetensors"


def build_adalora(model: PreTrainedModel, tuner: TunerConfig) -> nn.Module:
    """Wrap the model in a PeftModel whose layers start with rank ``adalora_init_r``.

    Raises:
        RecipeError: the target rank is not below the initial one, or there is no layer to adapt.
    """
    from peft import AdaLoraConfig

    RANKS.require("tuner.train_type=adalora")
    if tuner.adalora_target_r >= tuner.adalora_init_r:
        raise RecipeError(
            f"tuner.adalora_target_r={tuner.adalora_target_r} is not below tuner.adalora_init_r="
            f"{tuner.adalora_init_r}, so no rank could be pruned. Raise the second, or use tuner.train_type=lora."
        )
    require_whole_weights(model, "train_type=adalora")
    targets = place(model, tuner)
    if not isinstance(targets["target_modules"], list):
        raise RecipeError("tuner.train_type=adalora has no layer to adapt. Use tuner.train_type=lora, or full.")
    config = AdaLoraConfig(
        target_r=tuner.adalora_target_r,
        init_r=tuner.adalora_init_r,
        tinit=tuner.adalora_tinit,
        tfinal=tuner.adalora_tfinal,
        deltaT=tuner.adalora_deltaT,
        beta1=tuner.adalora_beta1,
        beta2=tuner.adalora_beta2,
        orth_reg_weight=tuner.adalora_orth_reg_weight,
        total_step=tuner.adalora_tinit + tuner.adalora_tfinal + 1,  # `begin` sets the real one
        lora_alpha=tuner.lora_alpha,
        lora_dropout=tuner.lora_dropout,
        bias=tuner.lora_bias,
        task_type="CAUSAL_LM",
        **targets,
    )
    wrapped: Any = wrap(model, config, tuner, AdaLoraPeftModel)
    freeze_rank_numbers(wrapped)
    count_trained_ranks(wrapped)
    return wrapped


def require_enough_steps(tuner: Any, total_steps: int) -> None:
    """Raise RecipeError if a run of ``total_steps`` leaves no step in which ranks are pruned."""
    _require_steps(tuner.adalora_tinit, tuner.adalora_tfinal, total_steps)


def _require_steps(tinit: int, tfinal: int, total_steps: int) -> None:
    if tinit + tfinal >= total_steps:
        raise RecipeError(
            f"tuner.adalora_tinit={tinit} steps before and tuner.adalora_tfinal={tfinal} steps after pruning leave "
            f"none of the run's {total_steps} steps to prune in. Lower them: adalora_tfinal counts from the end of the "
            "run."
        )


class AdaLoraPeftModel(TrainedPeftModel):
    """A PeftModel that prunes ranks during training; see the module's docstring."""

    @property
    def _config(self) -> Any:
        return self.peft_config[self.active_adapter]

    def begin(self, total_steps: int) -> None:
        config = self._config
        _require_steps(config.tinit, config.tfinal, total_steps)
        config.total_step = total_steps
        count_trained_ranks(self)

    def penalty(self) -> Tensor | None:
        """Return ``orth_reg_weight`` times the mean distance of the A and B from orthonormality, in float32.

        Source: equation 4 of the paper. peft adds it only to a loss that the model itself computes.
        """
        distances = []
        for name, value in self.named_parameters():
            if value.requires_grad and (".lora_A." in name or ".lora_B." in name):
                with torch.autocast(value.device.type, enabled=False):
                    factor = value.float() if ".lora_A." in name else value.float().T  # [R, features]
                    distances.append(torch.linalg.norm(factor @ factor.T - torch.eye(len(factor), device=value.device)))
        weight = self._config.orth_reg_weight
        return weight * torch.stack(distances).mean() if weight and distances else None

    def after_step(self, step: int) -> None:
        tuner: Any = self.base_model
        tuner.update_and_allocate(step)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Save as peft does, but with the current ranks: peft would drop those that have grown since the last
        pruning."""
        config, kept = self._config, self._config.rank_pattern
        weights = self._adapter_weights()
        used = {_short(name): (value != 0).flatten().tolist() for name, value in weights if ".lora_E." in name}
        config.rank_pattern = used
        try:
            super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            config.rank_pattern = kept

    def save_state(self, folder: Path) -> None:
        from safetensors.torch import save_file

        tensors: dict[str, Tensor] = {f"weight/{name}": value for name, value in self._adapter_weights()}
        for kind, scores in memory_of(self).items():
            tensors |= {f"{kind}/{name}": value for name, value in scores.items()}
        for name, mask in (self._config.rank_pattern or {}).items():
            tensors[f"rank_pattern/{name}"] = torch.tensor(mask)
        save_file({name: value.detach().contiguous().cpu() for name, value in tensors.items()}, folder / STATE)

    def restore(self, folder: Path, adapter_name: str) -> Any:
        from peft.utils import load_peft_weights, set_peft_model_state_dict
        from safetensors.torch import load_file

        self._config.rank_pattern = None  # with one, peft would resize the layers
        saved = load_peft_weights(str(folder), device="cpu")
        if not (folder / STATE).is_file():
            return set_peft_model_state_dict(self, self._padded(saved, folder), adapter_name=adapter_name)
        others = {name: value for name, value in saved.items() if ".lora_" not in name}
        result = set_peft_model_state_dict(self, others, adapter_name=adapter_name)
        state, weights = load_file(folder / STATE), dict(self._adapter_weights())
        allocator: Any = self.base_model.rankallocator
        allocator.reset_ipt()
        memory = memory_of(self)
        pattern = {}
        with torch.no_grad():
            for key, value in state.items():
                kind, _, name = key.partition("/")
                if kind == "weight":
                    weights[name].copy_(value)
                elif kind == "rank_pattern":
                    pattern[name] = value.tolist()
                else:
                    memory[kind][name] = value.to(weights[f"base_model.model.{name}"].device)
        self._config.rank_pattern = pattern or None
        return result

    def _adapter_weights(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, value) for name, value in self.named_parameters() if ".lora_" in name]

    def _padded(self, saved: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
        """Return the weights of a saved adapter with rows of zeros for the pruned ranks; they compute the same."""
        from peft import AdaLoraConfig

        config: Any = AdaLoraConfig.from_pretrained(str(folder))
        whole = dict(saved)
        for name, mask in (config.rank_pattern or {}).items():
            used = torch.tensor(mask)
            prefix = f"base_model.model.{name.removesuffix('.lora_E')}"
            for matrix, axis in (("lora_A", 0), ("lora_E", 0), ("lora_B", 1)):
                part = saved[f"{prefix}.{matrix}"]
                shape = list(part.shape)
                shape[axis] = len(mask)
                full = part.new_zeros(shape)
                full.index_copy_(axis, used.nonzero().flatten(), part)
                whole[f"{prefix}.{matrix}"] = full
        return whole


def _short(name: str) -> str:
    """Return a weight's name as peft writes it in ``rank_pattern``."""
    return name.removeprefix("base_model.model.")
