"""Trainer with an exact loss over planned rows; transformers runs the loop.

It overrides the loss (a sum over supervised tokens, divided once by their number in the global batch), the optimizer's
groups, and what is logged and saved. What it builds on overrides one thing each:

    PlannedTrainer      the training loop: hooks for what follows (upstream/trainer.py)
    RowTrainer          the loaders: a plan takes the place of a sampler
    StoppingTrainer     the end: what is saved before a run stops early
    EvaluatingTrainer   evaluation: the same sum
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainingArguments
from transformers.trainer_utils import TrainOutput

from qwenvl_ft.checkpoint.same_run import save_plan
from qwenvl_ft.checkpoint.stream_position import save_position
from qwenvl_ft.data.conversation import IGNORE
from qwenvl_ft.data.plan.dataset import SampleDataset
from qwenvl_ft.data.plan.sampler import EpochLoader, PlanSampler
from qwenvl_ft.model.compiled import restore_layers
from qwenvl_ft.model.released_layout import use_released_layout
from qwenvl_ft.recipe.schema import Recipe
from qwenvl_ft.training.activation_checkpointing import prepare_layers
from qwenvl_ft.training.answers import Questions
from qwenvl_ft.training.bad_samples import count_bad_samples, log_bad_samples
from qwenvl_ft.training.callbacks.tuning_method import TuningMethodCallback
from qwenvl_ft.training.device_batch import DeviceBatch, on_device
from qwenvl_ft.training.evaluating_trainer import EvaluatingTrainer
from qwenvl_ft.training.finite import LossCheck, require_finite_norm
from qwenvl_ft.training.liger import use_liger_kernels
from qwenvl_ft.training.loaders import datasets_in, has_media
from qwenvl_ft.training.loss import loss_sum, weight_sum
from qwenvl_ft.training.matches_recipe import require_prepared, require_settings
from qwenvl_ft.training.mean_loss import MeanLoss
from qwenvl_ft.training.meter import peak_memory_gib
from qwenvl_ft.training.neftune import SampleNoise
from qwenvl_ft.training.ranks import sum_over_ranks
from qwenvl_ft.training.saved_config import cache_enabled
from qwenvl_ft.training.schedule import floor_schedule
from qwenvl_ft.training.sealed import sealed_checkpoint
from qwenvl_ft.training.step_log import StepLog
from qwenvl_ft.tuning.methods.trained import TrainedPeftModel
from qwenvl_ft.tuning.optimizer import build_optimizer, param_groups
from qwenvl_ft.upstream.projected_modules import one_line_for_ignored_modules
from qwenvl_ft.upstream.trainer import EpochLength

LEAST_WEIGHT = 1e-9
"""Divisor of a step in which nothing is supervised."""


class QwenVLTrainer(EvaluatingTrainer):
    """transformers' Trainer for packed Qwen-VL rows.

    Args:
        model: from `prepare_model`.
        args: TrainingArguments; ``per_device_train_batch_size`` counts rows (packed) or samples (not packed).
        processor: saved into every checkpoint.
        train_dataset: a `SampleDataset`.
        eval_dataset: one, or a dict of them by name.
        max_length: tokens of a packed row.
        packing: fill rows from the plan; without it a batch joins ``per_device_train_batch_size`` samples.
        padding_free: False pads instead of joining, for comparison; excludes packing.
        sequence_parallel_size: consecutive ranks that share each row; the batch sizes count rows of such a group.
        vit_lr: learning rate of the vision tower; None is ``args.learning_rate``.
        aligner_lr: learning rate of all four mergers; None is ``args.learning_rate``.
        lorap_lr_ratio: factor on the learning rate of LoRA's B matrices (LoRA+); None is 1.
        loss_weights: data set -> weight of its tokens in training; None is 1 for all.
        zero_gradient_steps: consecutive steps without a gradient in a trainable part before a warning; 0 is never.
        checkpointed: ``llm`` and ``vision`` -> False to exempt it from activation checkpointing; None exempts neither.
        z_loss: weight of the squared logarithm of each softmax's sum, only in training.
        questions: answered by generation at each evaluation; None asks nothing.
        recipe: saved as ``recipe.yaml`` into every checkpoint, so that it can be run again.
        check_model: require that the model is prepared as ``recipe`` says, and that the arguments above are the
            recipe's; False for a model prepared in another way.

    Raises:
        RecipeError: the model is not prepared as ``recipe`` says, or an argument differs from it.
        TrainingError: a loss is NaN or infinite; names the records of its row.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        processor: Any,
        train_dataset: SampleDataset | None = None,
        eval_dataset: SampleDataset | dict[str, SampleDataset] | None = None,
        max_length: int = 8192,
        packing: bool = True,
        padding_free: bool = True,
        sequence_parallel_size: int = 1,
        vit_lr: float | None = None,
        aligner_lr: float | None = None,
        lorap_lr_ratio: float | None = None,
        loss_weights: dict[str, float] | None = None,
        zero_gradient_steps: int = 20,
        checkpointed: dict[str, bool] | None = None,
        z_loss: float = 0.0,
        questions: Questions | None = None,
        recipe: Recipe | None = None,
        check_model: bool = True,
        **options: Any,
    ) -> None:
        rows: dict[str, Any] = {
            "max_length": max_length,
            "packing": packing,
            "padding_free": padding_free,
            "sequence_parallel_size": sequence_parallel_size,
        }
        rates = {"vit_lr": vit_lr, "aligner_lr": aligner_lr, "lorap_lr_ratio": lorap_lr_ratio}
        if recipe is not None and check_model:
            require_prepared(model, recipe, args)
            require_settings(recipe, rows | rates | {"loss_weights": loss_weights, "z_loss": z_loss})
        self.vit_lr, self.aligner_lr, self.lorap_lr_ratio = vit_lr, aligner_lr, lorap_lr_ratio
        self.loss_weights = loss_weights or None
        self.checkpointed = checkpointed or {}
        self.z_loss = z_loss
        self.questions, self.recipe = questions, recipe
        self.losses, self.mean_loss = LossCheck(at_once=args.world_size == 1), MeanLoss()
        self.bad_samples = 0
        if isinstance(model, PreTrainedModel):  # a model that `load_model` has not loaded
            use_released_layout(model)
        liger, args.use_liger_kernel = args.use_liger_kernel, False  # transformers would patch classes, and fail
        super().__init__(
            model,
            args,
            processor=processor,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            compute_loss_func=_already_scaled,
            **rows,
            **options,
        )
        self.fused = use_liger_kernels(model, args, weighted=self.loss_weights is not None) if liger else None
        self.neftune_noise_alpha = None  # transformers' own noise fades with the length of the row
        self.noise = SampleNoise.of(model, args.neftune_noise_alpha) if args.neftune_noise_alpha else None
        self.step_log = StepLog(args, zero_gradient_steps, has_media=has_media(datasets_in(train_dataset)))
        self.saves_result = recipe is None or recipe.training.save_final
        self._add_callbacks(model)

    def _add_callbacks(self, model: nn.Module) -> None:
        for callback in self.step_log.callbacks(deepspeed=self.is_deepspeed_enabled):
            self.add_callback(callback)
        self.add_callback(self.mean_loss)
        if isinstance(model, TrainedPeftModel):
            self.add_callback(TuningMethodCallback(model))

    def get_train_dataloader(self) -> EpochLoader:
        loader = super().get_train_dataloader()
        sampler = cast(PlanSampler, loader.batch_sampler)
        self.step_log.meter.follow(sampler, self.max_length * self.rows_per_pass if self.packing else None)
        return loader

    def train(self, *arguments: Any, **options: Any) -> Any:
        """Train as transformers does; with ``torch_compile`` the layers are compiled only while it lasts."""
        try:
            output = super().train(*arguments, **options)
            return TrainOutput(output.global_step, output.metrics.get("train_loss", 0.0), output.metrics)
        finally:
            if self.args.torch_compile:
                restore_layers(cast(nn.Module, self.model))

    def before_wrapping(self) -> None:
        prepare_layers(cast(nn.Module, self.model), self.args, self.checkpointed)

    def begin_epoch(self, epoch: int) -> EpochLength | None:
        self.bad_samples = 0
        return super().begin_epoch(epoch)

    def end_epoch(self, epoch: int) -> None:
        self._replaced_samples(epoch)

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Any]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], Tensor]:
        """Return a step's micro-batches, and the number (or summed weights) of the global batch's supervised tokens."""
        read = self.agreement.together(lambda: list(islice(epoch_iterator, num_batches)))
        batches = [self.agreed(batch, self.samples) for batch in read]
        tokens = sum(int((batch["labels"][:, 1:] != IGNORE).sum()) for batch in batches)
        weights = sum(weight_sum(batch, self.loss_weights or {}) for batch in batches)
        own = torch.stack([torch.full((), n, dtype=torch.float64, device=device) for n in (tokens, weights)])
        # of all ranks, since others may have turns with weights; the ranks that share a row all count the whole row
        count, total = sum_over_ranks(own, self.accelerator) / self.sequence_parallel_size
        self.step_log.meter.supervised(count)
        return batches, total

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        if self.noise is not None:
            self.noise.follow(inputs, self.sequence)
        self.bad_samples += log_bad_samples(inputs)
        batch = DeviceBatch(on_device(inputs, self.args.device, self.loss_weights or {}, self.sequence))
        loss = super().training_step(model, {"batch": batch}, num_items_in_batch)
        self.losses.add(self.state.global_step + 1, loss, batch.loss, inputs["sources"])
        self.mean_loss.add(loss.double() * num_items_in_batch / self.args.world_size, batch.weight)
        return loss

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return this rank's share of the mean over the global batch's supervised tokens.

        The sum is divided once, by the tokens of all micro-batches and ranks, and multiplied by the number of ranks
        because gradients are averaged over them. Summed over micro-batches and averaged over ranks it is the mean.
        """
        batch: DeviceBatch = inputs["batch"]
        smoothing, z_loss = (self.args.label_smoothing_factor, self.z_loss) if model.training else (0.0, 0.0)
        total = loss_sum(model, batch.tensors, label_smoothing=smoothing, z_loss=z_loss)
        loss = total * self.args.world_size / torch.clamp(num_items_in_batch, min=LEAST_WEIGHT)
        inner = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        if isinstance(inner, TrainedPeftModel) and (penalty := inner.penalty()) is not None:
            loss = loss + penalty / self.current_gradient_accumulation_steps  # once a step, and averaged over ranks
        batch.loss = loss.detach()
        return (loss, None) if return_outputs else loss

    def _replaced_samples(self, epoch: int) -> int:
        """Return the number of unreadable samples replaced by placeholders this epoch, summed over ranks.

        Raises:
            DataError: they exceed ``data.max_bad_fraction``; on every rank.
        """
        return count_bad_samples(self.bad_samples, self.samples, self.samples.count_for_limit(epoch), self.accelerator)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0  # transformers' estimate counts neither images nor packing

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            target = cast(Any, model if model is not None else self.model)
            groups = param_groups(
                target,
                learning_rate=self.args.learning_rate,
                vit_lr=self.vit_lr,
                aligner_lr=self.aligner_lr,
                weight_decay=self.args.weight_decay,
                lora_plus=self.lorap_lr_ratio,
            )
            with one_line_for_ignored_modules():
                cls, options = self.get_optimizer_cls_and_kwargs(self.args, target)
            self.optimizer = build_optimizer(cls, options, groups, target)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if self.lr_scheduler is None:
            with_floor = floor_schedule(self.args, optimizer or self.optimizer, num_training_steps)
            if with_floor is not None:
                self.use_scheduler(with_floor)
        return super().create_scheduler(num_training_steps, optimizer)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs or "train_loss" in logs:  # the latter at the end, after steps that no line was logged of
            self.agreement.together(self.losses.check)
        if "loss" in logs:
            del logs["loss"]  # transformers' mean of means
            logs.update(self.mean_loss.since_log(self.accelerator))
            logs.update(self.step_log.read(logs, self.state))
            if bad := self._replaced_samples(self.train_sampler.epoch):
                logs["bad_samples"] = bad
            logs["peak_memory_gib"] = peak_memory_gib(self.args.device)
            scaled = self.accelerator.scaler is not None  # float16: an overflow skips the step and halves the scale
            if "grad_norm" in logs and not scaled:
                require_finite_norm(self.state.global_step, logs["grad_norm"])
        elif "train_loss" in logs:
            logs["train_loss"] = self.mean_loss.of_run(self.accelerator)
        super().log(logs, start_time)

    @contextmanager
    def saving(self) -> Iterator[None]:
        self.agreement.together(self.losses.check)
        self.mean_loss.save(self.state, self.accelerator)
        self.use_evaluation_weights()
        with self.step_log.meter.paused(), super().saving(), sealed_checkpoint(self.args, self.state):
            yield

    def save_beside_optimizer(self, folder: str) -> None:
        if self.args.should_save:
            save_plan(self.train_sampler, Path(folder))
            save_position(self.train_sampler, Path(folder))
            if isinstance(self.model, TrainedPeftModel):
                self.model.save_state(Path(folder))

    def save_result(self) -> None:
        """Save the trained model whole, also if FSDP writes the checkpoints of the run in shards."""
        plugin = self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None
        if plugin is None:
            return self.save_model()
        of_checkpoints = plugin.state_dict_type
        plugin.set_state_dict_type("FULL_STATE_DICT")
        try:
            self.save_model()
        finally:
            plugin.set_state_dict_type(of_checkpoints)

    def save_model(self, output_dir: str | None = None, *arguments: Any, **options: Any) -> None:
        """Save the weights, the processor and the recipe."""
        with cache_enabled(cast(Any, self.model).config):
            super().save_model(output_dir, *arguments, **options)
        if self.recipe is not None and self.args.should_save:
            self.recipe.save(Path(output_dir or str(self.args.output_dir)) / "recipe.yaml")


def _already_scaled(*_: Any, **__: Any) -> Any:
    """A loss function that is never called; with one, transformers does not divide the loss by the accumulation
    steps."""
    raise AssertionError("QwenVLTrainer.compute_loss computes the loss")
