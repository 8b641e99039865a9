"""Trainer that feeds transformers' loop with the rows of a plan: loaders, epochs of their own length, resume."""

from collections.abc import Sized
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import TrainingArguments
from transformers.trainer_utils import TrainOutput

from qwenvl_ft.checkpoint.complete import Resume, resolve_resume
from qwenvl_ft.checkpoint.same_run import NOT_SHARDED
from qwenvl_ft.data.collate import PaddedCollator, QwenVLCollator, vision_fillers
from qwenvl_ft.data.plan.costs import machine_costs
from qwenvl_ft.data.plan.dataset import SampleDataset
from qwenvl_ft.data.plan.sampler import EpochLoader, PlanSampler
from qwenvl_ft.data.share import Share
from qwenvl_ft.errors import CheckpointError, RecipeError
from qwenvl_ft.model.patch_embed import use_raw_patches
from qwenvl_ft.model.placed_media import MediaPlaces
from qwenvl_ft.model.sequence_parallel import KEY, SequenceGroup, exchange_heads, require_model
from qwenvl_ft.training.agreement import Agreement
from qwenvl_ft.training.loaders import are_raw, build_loader, build_plan, datasets_in, media_kinds
from qwenvl_ft.training.ranks import broadcast_from_rank_0, require_same_samples
from qwenvl_ft.training.row_agreement import RowAgreement
from qwenvl_ft.training.run_length import exact_counts
from qwenvl_ft.upstream.arguments import is_reentrant
from qwenvl_ft.upstream.attention import attention_of
from qwenvl_ft.upstream.media import placing_model
from qwenvl_ft.upstream.trainer import EpochLength, PlannedTrainer
from qwenvl_ft.upstream.workers import end_workers


class RowTrainer(PlannedTrainer):
    """transformers' Trainer over planned rows; `QwenVLTrainer` adds the loss, the optimizer and the logs.

    Args:
        options: further arguments of transformers' Trainer. The others are explained in `QwenVLTrainer`.

    Raises:
        RecipeError: packing with padding; raw pixels in only some of the data sets; several GPUs in this process; or
            ranks, a model or settings with which rows cannot be shared.
        DataError: the ranks see different samples.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        processor: Any,
        train_dataset: SampleDataset | None,
        eval_dataset: SampleDataset | dict[str, SampleDataset] | None,
        max_length: int,
        packing: bool,
        padding_free: bool,
        sequence_parallel_size: int = 1,
        **options: Any,
    ) -> None:
        if packing and not padding_free:
            raise RecipeError("training.padding_free=false pads one sample a row and excludes training.packing=true.")
        self.processor = processor
        self.max_length = max_length
        self.packing = packing
        self.padding_free = padding_free
        self.sequence_parallel_size = sequence_parallel_size
        self.sequence: SequenceGroup | None = None
        self.row_agreement: RowAgreement | None = None
        if sequence_parallel_size > 1:
            self._share_rows(model, args)
        datasets = datasets_in(train_dataset, eval_dataset)
        raw = are_raw(datasets)
        self.fillers = vision_fillers(processor, media_kinds(datasets), raw_pixels=raw)
        if raw:
            use_raw_patches(model, processor.image_processor)
        options |= {"train_dataset": train_dataset, "eval_dataset": eval_dataset}
        super().__init__(model, args, processing_class=processor, **options)
        if args.n_gpu > 1:
            raise RecipeError(
                f"one process sees {args.n_gpu} GPUs. Launch one per GPU: accelerate launch -m qwenvl_ft.train ..."
            )
        self.agreement = Agreement.of(args)
        for dataset in datasets:
            require_same_samples(dataset, dataset.first, args.world_size)
        self.costs = broadcast_from_rank_0(machine_costs(), args.world_size)

    def _share_rows(self, model: nn.Module, args: TrainingArguments) -> None:
        """Find the ranks that share each row with this one, and let the model's attention exchange heads."""
        setting = f"{KEY}={self.sequence_parallel_size}"
        if not self.padding_free:
            raise RecipeError(f"{setting} does not work with training.padding_free=false. Remove it.")
        if is_reentrant(args):
            raise RecipeError(
                f"{setting} does not work with reentrant checkpointing. Set training.activation_checkpointing_kwargs."
                "use_reentrant=false."
            )
        inner = placing_model(model)
        if inner is None:
            raise RecipeError(f"{setting} needs a Qwen3-VL from load_model.")
        text = inner.config.get_text_config()
        require_model(inner.config, attention_of(text), self.sequence_parallel_size)
        exchange_heads(text)
        timeout = timedelta(seconds=args.ddp_timeout)
        self.sequence = SequenceGroup.of(self.sequence_parallel_size, timeout)
        self.row_agreement = RowAgreement.of(self.sequence_parallel_size, timeout)

    @property
    def share(self) -> Share | None:
        """This rank's share of its rows; None if it trains them alone."""
        size = self.sequence_parallel_size
        if size == 1:
            return None
        return Share(size, self.args.process_index % size, self.processor.tokenizer.pad_token_id, self.costs)

    @property
    def engine(self) -> str:
        """What shards this run: a key of `ENGINES` in `checkpoint.same_run`, or its ``NOT_SHARDED``."""
        if self.is_deepspeed_enabled:
            zero_3 = self.accelerator.state.deepspeed_plugin.zero_stage == 3
            return "DeepSpeed ZeRO-3" if zero_3 else "DeepSpeed"
        return "FSDP" if self.is_fsdp_enabled else NOT_SHARDED

    @property
    def samples(self) -> SampleDataset:
        """The training samples."""
        return cast(SampleDataset, self.train_dataset)

    def train(
        self, resume_from_checkpoint: Resume | str | bool | None = None, *arguments: Any, **options: Any
    ) -> TrainOutput:
        """Train as transformers does, but resume only from a complete checkpoint.

        Args:
            resume_from_checkpoint: a folder; True for the newest complete checkpoint of ``output_dir``; or the result
                of `resolve_resume`, which has checked it already.

        Raises:
            CheckpointError: the checkpoint is not complete, or there is none.
        """
        start = resume_from_checkpoint
        if not isinstance(start, Resume):
            start = Resume(None) if not start else resolve_resume(start, Path(str(self.args.output_dir)))
            if start.folder is None and resume_from_checkpoint:
                raise CheckpointError(f"output_dir={self.args.output_dir} holds no complete checkpoint to resume from.")
        if self.sequence is not None:  # dropout and noise differ among the ranks of a row, as among its tokens
            torch.manual_seed(self.args.seed + self.sequence.place)
        try:
            return super().train(str(start.folder) if start.folder else None, *arguments, **options)
        finally:
            if self.callback_handler.train_dataloader is not None:
                end_workers(self.callback_handler.train_dataloader)

    def get_train_dataloader(self) -> EpochLoader:
        return self._loader(self.plan_sampler(self.samples), epochs=True)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> EpochLoader:
        if isinstance(eval_dataset, str):
            eval_dataset = cast(dict[str, Any], self.eval_dataset)[eval_dataset]
        dataset = eval_dataset if eval_dataset is not None else self.eval_dataset
        return self._loader(self.plan_sampler(cast(SampleDataset, dataset), training=False), epochs=False)

    def plan_sampler(self, dataset: SampleDataset, *, training: bool = True) -> PlanSampler:
        """Return this rank's plan over a data set: shuffled by epoch for training, in a fixed order for evaluation."""
        return build_plan(
            dataset,
            self.args,
            rows=self.rows_per_pass if training else self.args.per_device_eval_batch_size,
            packing=self.packing,
            max_length=self.max_length,
            costs=self.costs,
            training=training,
            ranks_per_row=self.sequence_parallel_size,
        )

    def _loader(self, sampler: PlanSampler, *, epochs: bool) -> EpochLoader:
        return build_loader(sampler, self.args, self._collator(), self.share, epochs=epochs)

    def _collator(self) -> QwenVLCollator | PaddedCollator:
        if self.padding_free:
            places = None if is_reentrant(self.args) else MediaPlaces.of(cast(nn.Module, self.model))
            return QwenVLCollator(self.fillers, places, self.share)
        return PaddedCollator(self.processor.tokenizer.pad_token_id, self.fillers)

    def agreed(self, batch: dict[str, Any], dataset: SampleDataset) -> dict[str, Any]:
        """Return a batch that all ranks that share its rows read alike, see `RowAgreement`.

        Every rank must call it: what one group raises stops the others too, which would wait for it in the next step.
        """
        agree, share = self.row_agreement, self.share
        if agree is None or share is None:
            return batch
        return self.agreement.together(lambda: agree(batch, dataset.shared(share), self._collator()))

    def num_examples(self, dataloader: Any) -> int:
        return len(cast(Sized, dataloader.dataset))

    def set_initial_training_values(self, args: TrainingArguments, dataloader: Any) -> Any:
        counts = super().set_initial_training_values(args, dataloader)
        self.train_sampler = cast(PlanSampler, dataloader.batch_sampler)
        return exact_counts(counts, args, self.train_sampler)

    def resume_at(self, step: int) -> tuple[int, int]:
        epochs, steps = self.train_sampler.locate(step)
        if steps == self.train_sampler.steps(epochs):  # the last step of a window
            return epochs + 1, 0
        return epochs, steps * self.args.gradient_accumulation_steps

    def begin_epoch(self, epoch: int) -> EpochLength | None:
        """Return the epoch's own number of rows; None after the last step, where transformers would train one more, and
        after the last window of a stream."""
        if self.state.global_step >= self.state.max_steps:
            return None
        dataset = self.train_sampler.dataset
        planned = self.agreement.together(lambda: dataset.at(epoch))
        if dataset.measured_as(epoch) == epoch > 0:
            require_same_samples(dataset, epoch, self.args.world_size)
        if not len(planned):
            return None
        return EpochLength(self.train_sampler.passes(epoch), self.train_sampler.steps(epoch))
