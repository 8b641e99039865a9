"""The length of a run whose epochs differ in their number of rows; transformers multiplies one epoch's length."""

import math

from transformers import TrainingArguments

from qwenvl_ft.data.plan.costs import CostModel
from qwenvl_ft.data.plan.dataset import SampleDataset
from qwenvl_ft.data.plan.sampler import PlanSampler
from qwenvl_ft.data.plan.windows import WindowDataset
from qwenvl_ft.recipe.schema import Recipe
from qwenvl_ft.training.loaders import build_plan
from qwenvl_ft.tuning.methods import METHODS

Counts = tuple[int, int, int, int, int, int | None, int]
"""As `Trainer.set_initial_training_values` returns them: epochs, steps of an epoch, samples of an epoch, samples of the
run, samples of a global batch, micro-batches of an epoch, steps of the run."""


def exact_counts(counts: Counts, args: TrainingArguments, sampler: PlanSampler) -> Counts:
    """Return the counts with those of the whole run (epochs, samples and steps) summed over its epochs."""
    epochs, epoch_steps, epoch_samples, samples, batch, micro_batches, steps = counts
    batch //= sampler.shape.ranks_per_row  # transformers counts a group's row once for each of its ranks
    if args.max_steps > 0:
        samples //= sampler.shape.ranks_per_row
    if isinstance(sampler.dataset, WindowDataset):  # an epoch is a window, of at least one step
        return args.max_steps, epoch_steps, epoch_samples, samples, batch, micro_batches, args.max_steps
    if sampler.dataset.measured_as(1) == 0:  # all epochs have the same lengths
        return epochs, epoch_steps, epoch_samples, samples, batch, micro_batches, steps
    if args.max_steps > 0:
        whole, begun = sampler.locate(args.max_steps)
        epochs = whole + (begun > 0)
    else:
        steps = planned_steps(args, sampler)
        whole = int(args.num_train_epochs)
        rest = args.num_train_epochs - whole
        samples = sum(len(sampler.dataset.at(epoch)) for epoch in range(whole))
        samples += math.ceil(rest * len(sampler.dataset.at(whole))) if rest else 0
    return epochs, epoch_steps, epoch_samples, samples, batch, micro_batches, steps


def planned_steps(args: TrainingArguments, sampler: PlanSampler) -> int:
    """Return the optimizer steps of a run: ``max_steps``, or those of its epochs, each of its own length."""
    if args.max_steps > 0:
        return args.max_steps
    whole = int(args.num_train_epochs)
    rest = args.num_train_epochs - whole
    return sum(map(sampler.steps, range(whole))) + (math.ceil(rest * sampler.steps(whole)) if rest else 0)


def require_enough_steps(recipe: Recipe, args: TrainingArguments, dataset: SampleDataset) -> None:
    """Raise RecipeError if the run is too short for the schedule of its method, before the model is loaded."""
    require = METHODS[recipe.tuner.train_type].enough_steps
    if require is None:
        return
    sampler = build_plan(
        dataset,
        args,
        rows=args.per_device_train_batch_size,
        packing=recipe.training.packing,
        max_length=recipe.template.max_length,
        costs=CostModel(),  # they balance the ranks and change no number of steps
        training=True,
        ranks_per_row=recipe.training.sequence_parallel_size,
    )
    require(recipe.tuner, planned_steps(args, sampler))
