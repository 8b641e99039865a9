"""Saves PiSSA (arXiv 2404.02948), OLoRA (arXiv 2406.01775) and LoRA-GA as adapters of the unchanged base model.

These initialisations give LoRA an update that is not zero and subtract it from the base weights, so that the outputs of
the model do not change. A checkpoint as peft writes it holds only the new update and fits only the changed base model.
This module writes it as a plain adapter of the original base model, with twice the rank.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwenvl_ft.errors import RecipeError
from qwenvl_ft.tuning.methods.trained import TrainedPeftModel

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def remember_start(wrapped: OriginalBasePeftModel) -> OriginalBasePeftModel:
    """Store the initial A and B, and return the model."""
    wrapped.remember()
    return wrapped


class OriginalBasePeftModel(TrainedPeftModel):
    """A PeftModel whose initialisation changed the base weights, saved as an adapter of the original base model.

    The base holds ``W - s B0 A0``. With ``A = [A1; A0]`` and ``B = [B1, -B0]``, the update ``s B A`` of W gives the
    same weights, so a checkpoint has twice the rank, and plain peft loads it on the original model.
    """

    start: dict[str, Tensor]
    """Key in the checkpoint -> A0 or B0, on the CPU."""

    def remember(self) -> None:
        """Store the current A and B as A0 and B0."""
        from peft import get_peft_model_state_dict

        state = get_peft_model_state_dict(self)
        self.start = {key: value.detach().cpu().clone() for key, value in state.items() if _is_factor(key)}

    def hold_in(self, dtype: torch.dtype) -> None:
        """Hold LoRA's weights in ``dtype``; the rounding error of A0 and B0 goes back into the base weights."""
        from peft import get_peft_model_state_dict

        self.remember()
        super().hold_in(dtype)
        state = get_peft_model_state_dict(self)
        self._move_base({key: state[key].detach().cpu().clone() for key in self.start})

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Save as peft does, then rewrite the adapter for the original base model."""
        from safetensors.torch import load_file, save_file

        super().save_pretrained(save_directory, *args, **kwargs)
        if not kwargs.get("is_main_process", True):
            return
        folder = Path(str(save_directory))
        state = load_file(folder / WEIGHTS)
        for key, value in state.items():
            if key in self.start:
                first = self.start[key].to(value.dtype)
                joined = (value, first) if ".lora_A." in key else (value, -first)
                state[key] = torch.cat(joined, dim=0 if ".lora_A." in key else 1).contiguous()
        save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        (folder / CONFIG).write_text(json.dumps(_with_twice_the_rank(config), indent=2, sort_keys=True), "utf-8")

    def restore(self, folder: Path, adapter_name: str) -> Any:
        """Split a saved adapter into the trained factors and A0, B0, and put both back.

        Raises:
            RecipeError: the checkpoint has a different rank.
        """
        from peft.utils import load_peft_weights, set_peft_model_state_dict

        trained, start = {}, {}
        for key, value in load_peft_weights(str(folder), device="cpu").items():
            if key not in self.start:
                trained[key] = value
                continue
            axis = 0 if ".lora_A." in key else 1
            if value.shape[axis] != 2 * self.start[key].shape[axis]:
                raise RecipeError(
                    f"{folder} has rank {value.shape[axis] // 2} at {key}, but tuner.lora_rank gives "
                    f"{self.start[key].shape[axis]}. Resume with the settings of the run that wrote it."
                )
            trained[key], first = value.chunk(2, dim=axis)
            start[key] = (first if axis == 0 else -first).contiguous().to(self.start[key].dtype)
        self._move_base(start)
        return set_peft_model_state_dict(self, trained, adapter_name=adapter_name)

    def _move_base(self, start: dict[str, Tensor]) -> None:
        """Set the base weights to ``W - s B0 A0`` for new A0 and B0; if these are equal (same seed), no bit changes."""
        for key, first in start.items():
            if ".lora_A." not in key:
                continue
            other = key.replace(".lora_A.", ".lora_B.")
            same = all(torch.equal(start[name].float(), self.start[name].float()) for name in (key, other))
            if same:
                continue
            layer: Any = self.get_submodule(key.partition(".lora_A.")[0])
            weight = layer.get_base_layer().weight
            delta = self.start[other].float() @ self.start[key].float() - start[other].float() @ first.float()
            with torch.no_grad():
                moved = weight.float() + layer.scaling[self.active_adapter] * delta.to(weight.device)
                weight.copy_(moved.to(weight.dtype))
        self.start |= start


def _is_factor(key: str) -> bool:
    return ".lora_A." in key or ".lora_B." in key


def _with_twice_the_rank(config: dict[str, Any]) -> dict[str, Any]:
    """Change adapter_config.json to twice the rank at the same scale, with a plain initialisation."""
    growth = math.sqrt(2) if config["use_rslora"] else 2
    config |= {"init_lora_weights": True, "lora_ga_config": None, "r": 2 * config["r"]}
    config["lora_alpha"] *= growth
    config["rank_pattern"] = {key: 2 * rank for key, rank in config["rank_pattern"].items()}
    config["alpha_pattern"] = {key: growth * alpha for key, alpha in config["alpha_pattern"].items()}
    return config
