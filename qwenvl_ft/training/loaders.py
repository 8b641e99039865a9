"""The plan over a data set on one rank, and the loader that reads it."""

from collections.abc import Sequence
from typing import Any

from transformers import TrainingArguments

from qwenvl_ft.data.plan.costs import CostModel
from qwenvl_ft.data.plan.dataset import SampleDataset
from qwenvl_ft.data.plan.packing import RunShape
from qwenvl_ft.data.plan.sampler import EpochLoader, PlanSampler
from qwenvl_ft.data.plan.windows import WindowDataset
from qwenvl_ft.data.plan.workers import fail_loudly, require_short_tempdir
from qwenvl_ft.data.share import Share
from qwenvl_ft.errors import RecipeError
from qwenvl_ft.upstream.arguments import worker_context


def datasets_in(*entries: Any) -> list[SampleDataset]:
    """Return all data sets of entries that are None, a data set, or a dict of data sets by name."""
    groups = [entry.values() if isinstance(entry, dict) else [entry] for entry in entries if entry is not None]
    return [dataset for group in groups for dataset in group]


def media_kinds(datasets: Sequence[SampleDataset]) -> tuple[str, ...]:
    """Return the media that every rank must run: images always, videos if any data set has one."""
    return ("image", "video") if any("video" in dataset.media_kinds for dataset in datasets) else ("image",)


def has_media(datasets: Sequence[SampleDataset]) -> bool:
    """Return True if any sample of the first epoch has an image or a video."""
    return any(bool(dataset.at(dataset.present).patches.any()) for dataset in datasets)


def are_raw(datasets: Sequence[SampleDataset]) -> bool:
    """Return True if the encoders leave pixels as bytes for the model to normalise.

    Raises:
        RecipeError: some do and others do not.
    """
    kinds = {dataset.encoder.raw_pixels for dataset in datasets}
    if len(kinds) > 1:
        raise RecipeError("some data sets have raw pixels and others do not. Give all of them the same Encoder.")
    return True in kinds


def build_plan(
    dataset: SampleDataset,
    args: TrainingArguments,
    *,
    rows: int,
    packing: bool,
    max_length: int,
    costs: CostModel,
    training: bool,
    ranks_per_row: int = 1,
) -> PlanSampler:
    """Return this rank's plan: shuffled by epoch for training, in a fixed order for evaluation.

    Args:
        rows: rows of a micro-batch on one rank; without packing, samples.
        costs: the same on every rank.
        ranks_per_row: consecutive ranks that train the same rows together.
    """
    accumulation = args.gradient_accumulation_steps if training else 1
    return PlanSampler(
        dataset,
        RunShape(args.world_size // ranks_per_row, rows, accumulation, ranks_per_row),
        rank=args.process_index // ranks_per_row,
        packing=packing,
        max_length=max_length,
        seed=args.data_seed if args.data_seed is not None else args.seed,
        shuffle=training,
        costs=costs,
        grouped=training and args.train_sampling_strategy == "group_by_length",
    )


def build_loader(
    sampler: PlanSampler, args: TrainingArguments, collator: Any, share: Share | None = None, *, epochs: bool
) -> EpochLoader:
    """Return the loader of a plan, with the workers that ``args`` asks for.

    Args:
        share: this rank's share of the rows, if several ranks train them together.
        epochs: keep the workers from one iteration to the next, if ``args`` says so.
    """
    workers = args.dataloader_num_workers
    options: dict[str, Any] = {"num_workers": workers, "pin_memory": args.dataloader_pin_memory and args.n_gpu > 0}
    if workers:
        require_short_tempdir()
        options["worker_init_fn"] = fail_loudly
        stream = isinstance(sampler.dataset, WindowDataset)  # a worker knows the windows that were read when it began
        options["persistent_workers"] = epochs and args.dataloader_persistent_workers and not stream
        options["prefetch_factor"] = args.dataloader_prefetch_factor
        options["multiprocessing_context"] = worker_context(args)
    dataset = sampler.dataset if share is None else sampler.dataset.shared(share)
    return EpochLoader(dataset, sampler, collator, **options)
