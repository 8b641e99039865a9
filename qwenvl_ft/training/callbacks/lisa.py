"""LISA (Pan and others 2024, arXiv 2403.17919): only a few layers of the language model train at a time.

Every ``interval`` steps ``layers`` of the decoder layers are drawn and the others frozen; embeddings, head, norm and
the other parts of the model train as the recipe says. A frozen layer drops its gradient and its optimizer state, which
is the memory that LISA saves, and starts with a fresh state when it is drawn again. The draw depends on the seed and
the step alone, so a resumed run and every rank draw the same layers. DDP must look for unused parameters, and keeps
room for the gradients of all layers.
"""

from __future__ import annotations

import random
from typing import Any

from torch import nn
from transformers import TrainerCallback

from qwenvl_ft.errors import RecipeError


class LisaCallback(TrainerCallback):
    """Freezes and unfreezes layers of the language model during full training.

    Args:
        layers: number of decoder layers that train at a time.
        interval: steps between two draws.
        seed: seed of the draws.
    """

    def __init__(self, layers: int, interval: int, seed: int) -> None:
        self.layers = layers
        self.interval = interval
        self.seed = seed
        self.active: list[int] = []
        """Indices of the layers that train."""
        self._weights: list[list[nn.Parameter]] = []
        self.candidates: list[int] = []
        """Indices of the layers that may train."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if args.deepspeed is not None or args.fsdp:
            raise RecipeError(
                "training.lisa_activated_layers freezes and unfreezes layers during training, which FSDP and DeepSpeed "
                "do not support. Remove them, or the key."
            )
        if args.world_size > 1 and not args.ddp_find_unused_parameters:
            raise RecipeError(
                "training.lisa_activated_layers freezes layers, for whose gradients DDP would wait over several "
                "processes. Set ddp_find_unused_parameters=True in TrainingArguments; a recipe does it by itself."
            )
        self._thaw()  # auto_find_batch_size begins a run again with smaller batches
        decoder = model.model.language_model.layers
        self._weights = [[value for value in layer.parameters() if value.requires_grad] for layer in decoder]
        self.candidates = [index for index, weights in enumerate(self._weights) if weights]
        if self.layers > len(self.candidates):
            frozen = len(decoder) - len(self.candidates)
            raise RecipeError(
                f"training.lisa_activated_layers={self.layers}, but the language model has {len(decoder)} layers"
                + (f", and {frozen} of them are frozen." if frozen else ".")
            )

    def on_step_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        if state.global_step % self.interval == 0 or not self.active:
            self._activate(state.global_step // self.interval, optimizer)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._thaw()

    def _thaw(self) -> None:
        for weights in self._weights:
            for value in weights:
                value.requires_grad_(True)
        self._weights, self.active = [], []

    def _activate(self, draw: int, optimizer: Any) -> None:
        self.active = sorted(random.Random(f"{self.seed}-{draw}").sample(self.candidates, self.layers))
        for index, weights in enumerate(self._weights):
            for value in weights:
                value.requires_grad_(index in self.active)
                if index not in self.active:
                    value.grad = None
                    optimizer.state.pop(value, None)
