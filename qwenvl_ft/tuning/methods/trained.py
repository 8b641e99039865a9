"""A PeftModel that takes part in training, beyond holding weights: what the trainer asks of it, and when."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwenvl_ft.upstream.peft import PeftModelForCausalLM


class TrainedPeftModel(PeftModelForCausalLM):
    """The base of such models; each of these does nothing here."""

    def begin(self, total_steps: int) -> None:
        """Called once before the first step, with the run's last step.

        Raises:
            RecipeError: the method's schedule does not fit into the run.
        """

    def penalty(self) -> Tensor | None:
        """What is added to the loss of each optimizer step, a scalar."""
        return None

    def after_step(self, step: int) -> None:
        """Called after the optimizer's step number ``step`` (from 1), before gradients are cleared."""

    def save_state(self, folder: Path) -> None:
        """Write what a resumed run needs beside the adapter; `load_adapter` reads it."""

    def load_adapter(self, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        """As in peft, but an adapter that this model trains is put back to where the checkpoint left it."""
        if adapter_name in self.peft_config and (Path(str(model_id)) / "adapter_model.safetensors").is_file():
            return self.restore(Path(str(model_id)), adapter_name)
        return super().load_adapter(model_id, adapter_name, *args, **kwargs)

    def restore(self, folder: Path, adapter_name: str) -> Any:
        """Put a saved adapter's weights in place of the trained ones; returns peft's load result.

        What the weights are held in stays; peft's own way would make float32 of them.
        """
        from peft.utils import load_peft_weights, set_peft_model_state_dict

        saved = load_peft_weights(str(folder), device="cpu")
        return set_peft_model_state_dict(self, saved, adapter_name=adapter_name)

    def hold_in(self, dtype: torch.dtype) -> None:
        """Hold LoRA's weights in ``dtype``."""
        for name, parameter in self.named_parameters():
            if ".lora_" in name:
                parameter.data = parameter.data.to(dtype)
