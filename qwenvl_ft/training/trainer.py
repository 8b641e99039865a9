"""Trainer with an exact loss over planned rows; transformers runs the loop.

What is overridden, and nothing else: the loaders (a plan instead of a sampler), the loss (a sum over supervised tokens
divided once by the global batch's), evaluation (the same sum), the optimizer's groups, and what is logged and saved.
"""

import logging
import math
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from qwenvl_ft.checkpoint.same_run import save_plan
from qwenvl_ft.data.collate import PaddedCollator, QwenVLCollator, vision_fillers
from qwenvl_ft.data.plan.costs import machine_costs
from qwenvl_ft.data.plan.dataset import EpochLoader, PlanSampler, SampleDataset
from qwenvl_ft.data.plan.packing import RunShape
from qwenvl_ft.data.plan.workers import fail_loudly, require_short_tempdir
from qwenvl_ft.errors import DataError, RecipeError, TrainingError
from qwenvl_ft.model.compiled import compile_layers, restore_layers
from qwenvl_ft.model.kernels import LOSS, Fused, use_liger
from qwenvl_ft.model.patch_embed import use_raw_patches
from qwenvl_ft.model.placed_media import MediaPlaces
from qwenvl_ft.recipe.schema import MIN_LR_SCHEDULES, Recipe
from qwenvl_ft.training.callbacks.method import MethodCallback
from qwenvl_ft.training.checkpointing import narrow_checkpointing
from qwenvl_ft.training.gradients import PartGradients
from qwenvl_ft.training.loss import loss_sum, split_labels, target_weights, use_fused_loss
from qwenvl_ft.training.meter import Meter, peak_memory_gib
from qwenvl_ft.training.neftune import SampleNoise
from qwenvl_ft.tuning.methods.trained import TrainedPeftModel
from qwenvl_ft.tuning.optimizer import (
    build_optimizer,
    logged_rates,
    param_groups,
    schedule_with_floor,
)
from qwenvl_ft.upstream.arguments import is_reentrant, recomputes, worker_context
from qwenvl_ft.upstream.trainer import EpochLength, PlannedTrainer

log = logging.getLogger("qwenvl_ft.data")


class QwenVLTrainer(PlannedTrainer):
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
        vit_lr: of the vision tower; None is ``args.learning_rate``.
        aligner_lr: of all four mergers; None is ``args.learning_rate``.
        lorap_lr_ratio: LoRA's B matrices learn at this many times their part's rate (LoRA+); None is once.
        loss_weights: data set -> weight of its tokens in training; None is 1 for all.
        zero_gradient_steps: steps in a row without a gradient in a trained part before a warning says why; 0 is never.
        checkpointed: of ``args.activation_checkpointing``, whether ``llm`` and ``vision`` take part; None is both.
        z_loss: weight of the squared logarithm of each softmax's sum, in training alone.
        recipe: saved as ``recipe.yaml`` into every checkpoint, so that it can be run again.

    Raises:
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
        vit_lr: float | None = None,
        aligner_lr: float | None = None,
        lorap_lr_ratio: float | None = None,
        loss_weights: dict[str, float] | None = None,
        zero_gradient_steps: int = 20,
        checkpointed: dict[str, bool] | None = None,
        z_loss: float = 0.0,
        recipe: Recipe | None = None,
        **more: Any,
    ) -> None:
        if packing and not padding_free:
            raise RecipeError("training.padding_free=false pads one sample a row and excludes training.packing=true.")
        self.max_length = max_length
        self.packing = packing
        self.padding_free = padding_free
        self.vit_lr = vit_lr
        self.aligner_lr = aligner_lr
        self.lorap_lr_ratio = lorap_lr_ratio
        self.loss_weights = loss_weights or None
        self.checkpointed = checkpointed or {}
        self.z_loss = z_loss
        self.recipe = recipe
        self.bad_samples = 0
        sets = _all_of(train_dataset, eval_dataset)
        raw = {dataset.encoder.raw_pixels for dataset in sets}
        if len(raw) > 1:
            raise RecipeError("some data sets have raw pixels, others not. Give all of them the same Encoder.")
        self.fillers = vision_fillers(processor, _media_kinds(sets), raw_pixels=True in raw)
        if True in raw:
            use_raw_patches(model, processor.image_processor)
        self._unchecked: list[_PassLoss] = []
        liger, args.use_liger_kernel = args.use_liger_kernel, False  # transformers would patch classes, and fail
        super().__init__(
            model,
            args,
            train_dataset=cast(Dataset[Any], train_dataset),
            eval_dataset=cast(Any, eval_dataset),
            processing_class=processor,
            compute_loss_func=_already_scaled,
            **more,
        )
        if args.n_gpu > 1:
            told = f"one process sees {args.n_gpu} GPUs"
            raise RecipeError(f"{told}. Launch one per GPU: accelerate launch -m qwenvl_ft.train ...")
        self.fused = self._use_liger() if liger else None
        self.noise: SampleNoise | None = None
        if args.neftune_noise_alpha:
            self.noise, self.neftune_noise_alpha = SampleNoise(args.neftune_noise_alpha), None  # not transformers' own
            cast(Any, self.model).get_input_embeddings().register_forward_hook(self.noise)
        for dataset in sets:
            require_alike(dataset, 0, args.world_size)
        has_media = any(bool(dataset.at(0).patches.any()) for dataset in _all_of(train_dataset))
        self.gradients = PartGradients(zero_gradient_steps, has_media=has_media)
        self.costs = same_everywhere(machine_costs(), args.world_size)
        self.meter = Meter(args)
        self.add_callback(self.meter)
        self.rates = PartRates()
        self.add_callback(self.rates)
        if not self.is_deepspeed_enabled:  # it keeps gradients to itself
            self.add_callback(self.gradients)
        if isinstance(model, TrainedPeftModel):
            self.add_callback(MethodCallback(model))

    def _use_liger(self) -> Fused:
        """Liger's kernels in the model, and in the loss if it can be told to them."""
        model = cast(nn.Module, self.model)
        fused = use_liger(model, self.args.device, self.args.liger_kernel_config)
        if fused.loss is not None:
            why = "loss_weights give tokens weights of their own" if self.loss_weights else ""
            if self.args.fp16:
                why = "autograd scales float16 gradients before they could vanish"
            if why := why or use_fused_loss(model, fused.loss):
                fused.loss, fused.left[LOSS] = None, why
        return fused

    # -- data ------------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> EpochLoader:
        sampler = self.plan_sampler(cast(SampleDataset, self.train_dataset))
        self.meter.follow(sampler, self.max_length * self.rows_per_pass if self.packing else None)
        return self._loader(sampler)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> EpochLoader:
        if isinstance(eval_dataset, str):
            eval_dataset = cast(dict[str, Any], self.eval_dataset)[eval_dataset]
        dataset = eval_dataset if eval_dataset is not None else self.eval_dataset
        return self._loader(self.plan_sampler(cast(SampleDataset, dataset), training=False))

    def plan_sampler(self, dataset: SampleDataset, *, training: bool = True) -> PlanSampler:
        """This rank's plan over a data set: shuffled by epoch for training, in a fixed order for evaluation."""
        args = self.args
        rows = self.rows_per_pass if training else args.per_device_eval_batch_size
        shape = RunShape(args.world_size, rows, args.gradient_accumulation_steps if training else 1)
        seed = args.data_seed if args.data_seed is not None else args.seed
        return PlanSampler(
            dataset,
            shape,
            rank=args.process_index,
            packing=self.packing,
            max_length=self.max_length,
            seed=seed,
            shuffle=training,
            costs=self.costs,
            grouped=training and args.train_sampling_strategy == "group_by_length",
        )

    def _loader(self, sampler: PlanSampler) -> EpochLoader:
        args = self.args
        workers = args.dataloader_num_workers
        collator = (
            QwenVLCollator(self.fillers, None if is_reentrant(args) else MediaPlaces.of(cast(nn.Module, self.model)))
            if self.padding_free
            else PaddedCollator(cast(Any, self.processing_class).tokenizer.pad_token_id, self.fillers)
        )
        options: dict[str, Any] = {"num_workers": workers, "pin_memory": args.dataloader_pin_memory and args.n_gpu > 0}
        if workers:
            require_short_tempdir()
            options["worker_init_fn"] = fail_loudly
            options["persistent_workers"] = args.dataloader_persistent_workers
            options["prefetch_factor"] = args.dataloader_prefetch_factor
            options["multiprocessing_context"] = worker_context(args)
        return EpochLoader(sampler.dataset, sampler, collator, **options)

    def num_examples(self, dataloader: Any) -> int:
        return len(cast(Sized, dataloader.dataset))

    def train(self, *arguments: Any, **options: Any) -> Any:
        """As transformers'; layers are compiled while it lasts."""
        try:
            return super().train(*arguments, **options)
        finally:
            if self.args.torch_compile:
                restore_layers(cast(nn.Module, self.model))

    # -- steps: transformers counts those of one epoch for all ----------------------------------------------------

    def set_initial_training_values(self, args: TrainingArguments, dataloader: Any) -> Any:
        """The counts of an epoch and of the run, whose epochs may differ in their number of rows."""
        epochs, steps, examples, samples, batch, passes, max_steps = super().set_initial_training_values(
            args, dataloader
        )
        sampler = self.train_sampler = cast(PlanSampler, dataloader.batch_sampler)
        if sampler.dataset.measured_as(1) == 0:
            return epochs, steps, examples, samples, batch, passes, max_steps
        if args.max_steps > 0:
            whole, begun = sampler.locate(args.max_steps)
            epochs = whole + (begun > 0)
        else:
            whole = int(args.num_train_epochs)
            rest = args.num_train_epochs - whole
            max_steps = sum(map(sampler.steps, range(whole))) + (math.ceil(rest * sampler.steps(whole)) if rest else 0)
            samples = sum(len(sampler.dataset.at(epoch)) for epoch in range(whole))
            samples += math.ceil(rest * len(sampler.dataset.at(whole))) if rest else 0
        return epochs, steps, examples, samples, batch, passes, max_steps

    def before_wrapping(self) -> None:
        """Which layers are recomputed, and whether they are compiled."""
        model, args = cast(nn.Module, self.model), self.args
        if recomputes(args):
            narrow_checkpointing(model, self.checkpointed)
        if args.torch_compile:
            count = compile_layers(model, backend=str(args.torch_compile_backend), mode=args.torch_compile_mode)
            if count == 0:
                raise RecipeError("training.torch_compile=true: no layer of this model can be compiled. Remove it.")

    def resume_at(self, step: int) -> tuple[int, int]:
        epochs, steps = self.train_sampler.locate(step)
        return epochs, steps * self.args.gradient_accumulation_steps

    def begin_epoch(self, epoch: int) -> EpochLength | None:
        """An epoch's own number of rows.

        A run that is resumed at its last step is done; transformers would train one step more.
        """
        if self.state.global_step >= self.state.max_steps:
            return None
        data = self.train_sampler.dataset
        if data.measured_as(epoch) == epoch > 0:
            require_alike(data, epoch, self.args.world_size)
        self.bad_samples = 0
        return EpochLength(self.train_sampler.passes(epoch), self.train_sampler.steps(epoch))

    def end_epoch(self, epoch: int) -> None:
        self.check_bad_samples(epoch)

    # -- loss ------------------------------------------------------------------------------------------------------

    def to_device(self, data: Any) -> Any:
        """A value of a batch; the host does not wait for a copy to a GPU, and float32 stays float32."""
        if not isinstance(data, Tensor):
            return data
        if data.device.type == "cpu" and self.args.device.type == "cuda" and not data.is_pinned():
            data = data.pin_memory()
        return data.to(self.args.device, non_blocking=True)

    def ready(self, batch: dict[str, Any], weights: dict[str, float] | None = None) -> dict[str, Any]:
        """A batch on the device, its labels as `split_labels` makes them."""
        return {name: self.to_device(value) for name, value in split_labels(batch, weights).items()}

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Any]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], Tensor]:
        """A step's batches, and the global batch's supervised tokens or, of weighted ones, the sum of the weights."""
        batches = list(islice(epoch_iterator, num_batches))
        tokens = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
        count = torch.full((), tokens, device=device, dtype=torch.int64)
        if self.args.world_size > 1:
            count = self.accelerator.reduce(count, reduction="sum")
        self.meter.supervised(count)
        return batches, count if self.loss_weights is None else self._summed_weights(batches, device)

    def _summed_weights(self, batch_samples: list[dict[str, Any]], device: torch.device) -> Tensor:
        assert self.loss_weights is not None
        summed = sum(float(target_weights(batch, self.loss_weights).sum()) for batch in batch_samples)
        total = torch.full((), summed, device=device, dtype=torch.float64)
        return cast(Tensor, self.accelerator.reduce(total, reduction="sum")) if self.args.world_size > 1 else total

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        if self.noise is not None:
            self.noise.follow(inputs)
        self.bad_samples += _warn(inputs)
        ready = _Ready(self.ready(inputs, self.loss_weights))
        loss = super().training_step(model, {"batch": ready}, num_items_in_batch)
        self._unchecked.append(_PassLoss(self.state.global_step + 1, loss, ready.loss, inputs["sources"]))
        if loss.device.type == "cpu":
            self.check_losses()
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """This rank's share of the mean over the global batch's supervised tokens.

        The sum is divided once, by the tokens of all passes and ranks, and multiplied by the ranks because gradients
        are averaged over them. Summed over passes and averaged over ranks it is the mean.
        """
        ready: _Ready = inputs["batch"]
        smoothing, z_loss = (self.args.label_smoothing_factor, self.z_loss) if model.training else (0.0, 0.0)
        total = loss_sum(model, ready.tensors, label_smoothing=smoothing, z_loss=z_loss)
        loss = (
            total * self.args.world_size / torch.clamp(num_items_in_batch, min=1 if self.loss_weights is None else 1e-9)
        )
        inner = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        if isinstance(inner, TrainedPeftModel) and (penalty := inner.penalty()) is not None:
            loss = loss + penalty / self.current_gradient_accumulation_steps  # once a step, and averaged over ranks
        ready.loss = loss.detach()
        return (loss, None) if return_outputs else loss

    def check_losses(self) -> None:
        """Look at the losses since the last check. Waits for the device once.

        Raises:
            TrainingError: one is not finite, or transformers has trained on another than `compute_loss` returned.
        """
        unchecked, self._unchecked = self._unchecked, []
        if not unchecked:
            return
        losses = torch.stack([torch.stack((entry.trained, entry.computed)).double() for entry in unchecked]).tolist()
        for entry, (trained, computed) in zip(unchecked, losses, strict=True):
            if not math.isfinite(trained):
                rows = ", ".join(str(source) for source in entry.sources)
                raise TrainingError(
                    f"step {entry.step}: the loss is {trained} in the row of {rows}. Look at these "
                    "records; else lower training.learning_rate or training.max_grad_norm, or use "
                    "model.torch_dtype=bfloat16 instead of float16."
                )
            if trained != computed:
                raise TrainingError(
                    f"step {entry.step}: transformers {transformers.__version__} made {trained} of the loss {computed} "
                    "before the backward pass. Install a version that docs/compatibility.md lists."
                )

    def check_bad_samples(self, epoch: int) -> int:
        """Samples of this epoch that others stand in for, over all ranks.

        Raises:
            DataError: more than ``data.max_bad_fraction`` of the epoch; on every rank.
        """
        dataset = cast(SampleDataset, self.train_dataset)
        return self._checked_bad(self.bad_samples, dataset, len(dataset.at(epoch)))

    def _checked_bad(self, bad: int, dataset: SampleDataset, samples: int) -> int:
        if dataset.on_error == "raise":
            return 0
        if self.args.world_size > 1:
            count = torch.tensor(bad, device=self.args.device)
            bad = int(cast(Tensor, self.accelerator.reduce(count, reduction="sum")))
        if bad > dataset.max_bad_fraction * samples:
            raise DataError(
                f"{dataset.name}: {bad} of the epoch's {samples} samples could not be made, more than "
                f"data.max_bad_fraction={dataset.max_bad_fraction:g}. The warnings above name them."
            )
        return bad

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0  # transformers' estimate counts neither images nor packing

    # -- optimizer -------------------------------------------------------------------------------------------------

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
            cls, options = self.get_optimizer_cls_and_kwargs(self.args, target)
            self.optimizer = build_optimizer(cls, options, groups, target)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        kwargs = dict(cast(dict[str, Any], self.args.lr_scheduler_kwargs or {}))
        if self.lr_scheduler is None and self.args.lr_scheduler_type in MIN_LR_SCHEDULES and "min_lr" in kwargs:
            schedule = schedule_with_floor(
                self.args.lr_scheduler_type,
                cast(torch.optim.Optimizer, optimizer or self.optimizer),
                warmup_steps=self.args.get_warmup_steps(num_training_steps),
                total_steps=num_training_steps,
                min_lr=float(kwargs.pop("min_lr")),
                **kwargs,
            )
            self.use_scheduler(schedule)
        return super().create_scheduler(num_training_steps, optimizer)

    def _settle(self) -> None:
        """Schedule-free optimizers train at other weights than those to evaluate and save: switch to the latter. The
        next training step switches back."""
        if self.optimizer is not None and callable(getattr(self.optimizer, "eval", None)):
            cast(Any, self.optimizer).eval()

    # -- evaluation ------------------------------------------------------------------------------------------------

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """As transformers'; several sets have a loss each, and ``eval_loss`` is the mean over all their tokens."""
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        sets = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(sets, dict):
            together = _over_all_sets(metrics, list(sets), metric_key_prefix)
            self.log(together)
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, together)
            metrics |= together
        return metrics

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Mean loss over all supervised tokens of the set and its perplexity, whatever the batches and processes."""
        with self.meter.paused():
            return self._mean_loss(dataloader, metric_key_prefix)

    def _mean_loss(self, dataloader: Any, metric_key_prefix: str) -> EvalLoopOutput:
        model = self._evaluation_model()
        was_training = model.training
        self._settle()
        model.eval()
        total = torch.zeros(2, dtype=torch.float64, device=self.args.device)  # loss, tokens
        bad = 0
        with torch.no_grad():
            for inputs in cast(Iterable[dict[str, Any]], dataloader):
                bad += _warn(inputs)
                batch = self.ready(inputs)
                with self.compute_loss_context_manager():
                    total[0] += loss_sum(model, batch).double()
                total[1] += batch["targets"].numel()
        if self.args.world_size > 1:
            total = self.accelerator.reduce(total, reduction="sum")
        model.train(was_training)
        loss, tokens = total.tolist()
        mean = loss / max(tokens, 1)
        metrics = {
            f"{metric_key_prefix}_loss": mean,
            f"{metric_key_prefix}_perplexity": math.exp(min(mean, 700.0)),
            f"{metric_key_prefix}_supervised_tokens": int(tokens),
        }
        count = len(cast(Sized, dataloader.dataset))
        if bad := self._checked_bad(bad, dataloader.dataset, count):
            metrics[f"{metric_key_prefix}_bad_samples"] = bad
        return EvalLoopOutput(predictions=cast(Any, None), label_ids=None, metrics=metrics, num_samples=count)

    def _evaluation_model(self) -> nn.Module:
        """The model as training wraps it, or prepared for evaluation alone."""
        if not self.is_prepared:
            self.is_prepared = True
            return self.accelerator.prepare_model(cast(nn.Module, self.model), evaluation_mode=True)
        return cast(nn.Module, self.model)

    # -- log and save ----------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            self.check_losses()
            if "learning_rate" in logs:
                logs["learning_rate"] = self.rates.of_llm(logs["learning_rate"])
            logs.update({f"lr/{part}": rate for part, rate in self.rates.by_part.items()})
            logs.update(self.gradients.read(logs.get("grad_norm")))
            logs.update(self.meter.read(self.state))
            if bad := self.check_bad_samples(self.train_sampler.epoch):
                logs["bad_samples"] = bad
            logs["peak_memory_gib"] = peak_memory_gib(self.args.device)
            scaled = self.accelerator.scaler is not None  # float16: an overflow skips the step and halves the scale
            if not scaled and "grad_norm" in logs and not math.isfinite(logs["grad_norm"]):
                raise TrainingError(
                    f"step {self.state.global_step}: the gradient norm is {logs['grad_norm']} although the loss is "
                    "finite. Lower training.learning_rate, or use model.torch_dtype=bfloat16 instead of float16."
                )
        super().log(logs, start_time)

    @contextmanager
    def saving(self) -> Iterator[None]:
        self.check_losses()
        self._settle()
        with self.meter.paused():
            yield

    def save_beside_optimizer(self, folder: str) -> None:
        if self.args.should_save:
            save_plan(self.train_sampler, Path(folder))
            if isinstance(self.model, TrainedPeftModel):
                self.model.save_state(Path(folder))

    def save_model(self, output_dir: str | None = None, *arguments: Any, **options: Any) -> None:
        """Weights, processor and recipe; served checkpoints generate with a cache, so the config says so again."""
        config = cast(Any, self.model).config
        configs = [config, getattr(config, "text_config", None)]
        for config in filter(None, configs):
            config.use_cache = True
        try:
            super().save_model(output_dir, *arguments, **options)
        finally:
            for config in filter(None, configs):
                config.use_cache = False
        if self.recipe is not None and self.args.should_save:
            self.recipe.save(Path(output_dir or str(self.args.output_dir)) / "recipe.yaml")


@dataclass
class _Ready:
    """A batch that is on its device. transformers hands on what it does not know, as it is."""

    tensors: dict[str, Any]
    loss: Tensor | None = None
    """What `compute_loss` made of it."""


@dataclass(frozen=True)
class _PassLoss:
    """The loss of one pass, as far as it is known without waiting for the device."""

    step: int
    trained: Tensor
    computed: Any
    sources: list[Any]


class PartRates(TrainerCallback):
    """The learning rates of a step, by part."""

    def __init__(self) -> None:
        self.by_part: dict[str, float] = {}

    def on_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        """Before the schedule moves on."""
        self.by_part = logged_rates(optimizer)

    def of_llm(self, otherwise: float) -> float:
        """The language model's rate, or the first group's if that is frozen."""
        return self.by_part["llm"] if "llm" in self.by_part else next(iter(self.by_part.values()), otherwise)


def _already_scaled(*_: Any, **__: Any) -> Any:
    """transformers divides the loss by the number of accumulated passes, unless it has a loss function like this."""
    raise AssertionError("QwenVLTrainer.compute_loss computes the loss")


def _warn(batch: dict[str, Any]) -> int:
    """Say which records others stand in for in a batch; how many."""
    faults = batch.get("faults", [])
    for fault in faults:
        log.warning("left out (data.on_error=skip): %s", fault)
    return len(faults)


def _all_of(*datasets: Any) -> list[SampleDataset]:
    """Those that are there, and those of a dict of them."""
    return [
        d for entry in datasets if entry is not None for d in (entry.values() if isinstance(entry, dict) else [entry])
    ]


def same_everywhere(value: Any, world_size: int) -> Any:
    """The first process's value: what a plan depends on must not differ between machines."""
    if world_size > 1:
        told = [value]
        torch.distributed.broadcast_object_list(told, src=0)
        return told[0]
    return value


def require_alike(dataset: SampleDataset, epoch: int, world_size: int) -> None:
    """Refuse processes that see other data: each would follow a plan of its own, and they would wait for each other.

    Raises:
        DataError: on every process, with the samples that each has.
    """
    if world_size == 1:
        return
    told: list[Any] = [None] * world_size
    torch.distributed.all_gather_object(told, dataset.at(epoch).key())
    differing = next((rank for rank in range(world_size) if told[rank] != told[0]), None)
    if differing is not None:
        raise DataError(
            f"{dataset.name}: process 0 has {told[0][0]:,} samples and process {differing} {told[differing][0]:,}"
            + (", of other lengths" if told[0][0] == told[differing][0] else "")
            + ". All processes need the same records and media: are files of a machine missing, or others?"
        )


def _media_kinds(sets: list[SampleDataset]) -> tuple[str, ...]:
    """The media that every rank must run: images always, videos if any data set has one."""
    return ("image", "video") if any("video" in d.media_kinds for d in sets) else ("image",)


def _over_all_sets(metrics: dict[str, float], names: list[str], prefix: str) -> dict[str, float]:
    """Loss, perplexity and supervised tokens of several sets as if they were one."""
    tokens = [metrics[f"{prefix}_{name}_supervised_tokens"] for name in names]
    losses = [metrics[f"{prefix}_{name}_loss"] for name in names]
    mean = sum(loss * count for loss, count in zip(losses, tokens, strict=True)) / max(sum(tokens), 1)
    return {
        f"{prefix}_loss": mean,
        f"{prefix}_perplexity": math.exp(min(mean, 700.0)),
        f"{prefix}_supervised_tokens": sum(tokens),
    }
