"""Base class of PeftModels that the trainer calls during training, for methods such as AdaLoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwenvl_ft.upstream.peft import PeftModelForCausalLM


class TrainedPeftModel(PeftModelForCausalLM):
    """PeftModel with hooks for the trainer. The hooks do nothing; subclasses override those that they need."""

    def begin(self, total_steps: int) -> None:
        """Called once before the first step, with the number of optimizer steps of the run.

        Raises:
            RecipeError: the method's schedule does not fit into the run.
        """

    def penalty(self) -> Tensor | None:
        """Return a scalar to add to the loss of each optimizer step, or None."""
        return None

    def after_step(self, step: int) -> None:
        """Called after optimizer step number ``step`` (from 1), before gradients are cleared."""

    def save_state(self, folder: Path) -> None:
        """Write to a checkpoint what a resumed run needs besides the adapter; `load_adapter` reads it."""

    def load_adapter(self, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        """Load as peft does, except that an adapter in training is restored with `restore`."""
        if adapter_name in self.peft_config and (Path(str(model_id)) / "adapter_model.safetensors").is_file():
            return self.restore(Path(str(model_id)), adapter_name)
        return super().load_adapter(model_id, adapter_name, *args, **kwargs)

    def restore(self, folder: Path, adapter_name: str) -> Any:
        """Replace the weights in training by a saved adapter's, and return peft's load result.

        The weights keep their dtype; peft's own method would convert them to float32.
        """
        from peft.utils import load_peft_weights, set_peft_model_state_dict

        saved = load_peft_weights(str(folder), device="cpu")
        return set_peft_model_state_dict(self, saved, adapter_name=adapter_name)

    def hold_in(self, dtype: torch.dtype) -> None:
        """Hold LoRA's weights in ``dtype``."""
        for name, parameter in self.named_parameters():
            if ".lora_" in name:
                parameter.data = parameter.data.to(dtype)
