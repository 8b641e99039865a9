"""Holds the model, data and trainer under test, built as training builds them, and all measurements of them."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qwenvl_ft.data.conversation import Sample
from qwenvl_ft.data.encode.by_recipe import build_encoder
from qwenvl_ft.data.plan.dataset import SampleDataset
from qwenvl_ft.prove.measure import Measured, Share
from qwenvl_ft.prove.proof_recipe import ProofOptions
from qwenvl_ft.recipe.schema import Recipe
from qwenvl_ft.upstream.autocast import forward_restored

FACTOR = 3.0
"""Largest allowed ratio of a packed sample's error to the error of the sample alone, against the same reference."""
FLOOR = {torch.float32: 1e-5, torch.bfloat16: 1e-3, torch.float16: 2.5e-4}
"""Constant part of the tolerance: about 80 rounding steps of float32, a quarter of one of 16 bits."""


@dataclass
class Subject:
    """Everything under test. The model is released once it has been saved and measured."""

    recipe: Recipe
    args: Any
    options: ProofOptions
    folder: Path
    processor: Any
    dataset: SampleDataset
    samples: list[Sample]
    trainer: Any
    dtype: torch.dtype
    """Precision of the run's computation."""
    say: Callable[[str], None]
    """Callback that receives a line of text before each long step."""
    share: Share
    """Elements of the gradients that are kept."""
    alone: Measured | None = None
    """Each sample alone, in the run's precision."""
    reference: Measured | None = None
    """Each sample alone, as exactly as memory allows."""
    facts: dict[str, str] = field(default_factory=dict)
    """Lines of the report above its rows: name -> text."""
    before: list[torch.Tensor] = field(default_factory=list)
    """Logits of the samples before training."""
    after: list[torch.Tensor] = field(default_factory=list)
    """Logits of the samples after training."""

    @property
    def model(self) -> Any:
        return self.trainer.model

    @property
    def device(self) -> torch.device:
        return self.args.device

    @property
    def floor(self) -> float:
        return FLOOR[self.dtype]

    def autocast(self) -> Any:
        """Return the context of the run's precision, as accelerate sets it around the model."""
        return nullcontext() if self.dtype == torch.float32 else torch.autocast(self.device.type, dtype=self.dtype)

    def noise(self, quantity: str) -> float:
        """Return the largest rounding error: that of the samples alone in the run's precision.

        Args:
            quantity: ``logits``, ``losses`` or ``gradients``.
        """
        assert self.alone is not None
        assert self.reference is not None
        return max(error for _, error in self.alone.errors(self.reference, quantity))

    def trainer_like(self, *, packing: bool, max_length: int, rows: int = 1, passes: int = 1) -> Any:
        """Build a second trainer over the same model and samples, for one step that changes no weight.

        Args:
            rows: rows per micro-batch; without packing, samples.
            passes: micro-batches per step.
        """
        from transformers.training_args import OptimizerNames

        from qwenvl_ft.training.build import build_trainer
        from qwenvl_ft.training.callbacks.tuning_method import TuningMethodCallback

        recipe, args = copy.deepcopy(self.recipe), copy.copy(self.args)
        recipe.training.packing, recipe.template.max_length = packing, max_length
        recipe.training.vit_lr = recipe.training.aligner_lr = None
        args.per_device_train_batch_size, args.gradient_accumulation_steps = rows, passes
        args.learning_rate, args.weight_decay, args.max_steps, args.max_grad_norm = 0.0, 0.0, 1, 1e9
        args.optim, args.optim_args, args.optim_target_modules = OptimizerNames.SGD, None, None
        trainer = build_trainer(recipe, args, self.model, self.processor, self.dataset, callbacks=[])
        trainer.remove_callback(TuningMethodCallback)  # AdaLoRA would prune its ranks
        calm(trainer)
        return trainer

    def train_faster(self, factor: float) -> None:
        """Replace the trainer by one that continues at ``factor`` times all learning rates."""
        from qwenvl_ft.training.build import build_trainer

        recipe, args, model = copy.deepcopy(self.recipe), copy.copy(self.args), self.model
        args.learning_rate *= factor
        for key in ("vit_lr", "aligner_lr"):
            if (rate := getattr(recipe.training, key)) is not None:
                setattr(recipe.training, key, rate * factor)
        self.trainer = None
        self.trainer = build_trainer(recipe, args, model, self.processor, self.dataset)
        calm(self.trainer)

    def release(self) -> None:
        """Free the memory of the model."""
        self.trainer = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def build_subject(recipe: Recipe, options: ProofOptions, folder: Path, say: Callable[[str], None]) -> Subject:
    """Build everything that a run of the recipe needs.

    Raises:
        QwenVLError: as `qwenvl_ft.train` does.
    """
    from qwenvl_ft import assemble
    from qwenvl_ft.prove.proof_data import proof_dataset
    from qwenvl_ft.training.build import build_trainer
    from qwenvl_ft.training.prepare import prepare_run

    args = prepare_run(recipe)
    processor = assemble.build_processor(recipe)
    encoder = build_encoder(recipe, processor)
    encoder.turn_weights = False  # the figures compared are of unweighted losses
    dataset = proof_dataset(
        recipe,
        encoder,
        samples=options.samples,
        max_tokens=options.max_tokens,
        folder=folder / "lengths",
    )
    samples = [dataset[index] for index in range(len(dataset))]
    say(f"loading {recipe.model.model}")
    model = assemble.build_model(recipe, args, dataset)
    trainer = build_trainer(recipe, args, model, processor, dataset)
    calm(trainer)
    return Subject(
        recipe=recipe,
        args=args,
        options=options,
        folder=folder,
        processor=processor,
        dataset=dataset,
        samples=samples,
        trainer=trainer,
        dtype=torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32,
        say=say,
        share=Share.of(model),
    )


def run_to_end(trainer: Any) -> None:
    """Train, and keep only the weights.

    Otherwise accelerate's wrapper around the model's forward would stay and compute the reference in 16 bits, and the
    optimizer's states would take the memory that the reference needs.
    """
    with forward_restored(trainer.model):
        trainer.train()
    trainer.optimizer = trainer.lr_scheduler = None
    trainer.accelerator.free_memory()


def still(model: nn.Module) -> None:
    """Turn off every kind of dropout, so that two passes over the same sample agree."""
    for module in model.modules():
        layer: Any = module
        if "Dropout" in type(module).__name__ and isinstance(getattr(layer, "p", None), float):
            layer.p = 0.0


def calm(trainer: Any) -> None:
    """In float16, start with a loss scale that does not overflow; otherwise the first steps are skipped."""
    scaler = trainer.accelerator.scaler
    if scaler is not None:
        scaler.scale(torch.zeros(1, device=trainer.args.device))
        scaler.update(1024.0)
