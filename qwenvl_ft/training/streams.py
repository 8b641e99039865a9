"""How do the ranks of a run share a stream? They agree on its shards, and on where a resumed run goes on."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from transformers import TrainingArguments

from qwenvl_ft.assemble import stream_options
from qwenvl_ft.checkpoint.stream_position import saved_position
from qwenvl_ft.data.plan.windows import StreamOptions
from qwenvl_ft.data.sources.shards import Shard
from qwenvl_ft.recipe.schema import Recipe
from qwenvl_ft.training.agreement import Agreement
from qwenvl_ft.training.ranks import broadcast_from_rank_0


def shared_stream(
    recipe: Recipe, args: TrainingArguments, ranks: Agreement, checkpoint: Path | None
) -> StreamOptions | None:
    """Return how this process reads the recipe's stream; None for a recipe without ``data.streaming``.

    Args:
        checkpoint: of the run that is resumed, if any.

    Raises:
        CheckpointError: the checkpoint is of a run without a stream.
    """
    if not recipe.data.streaming:
        return None
    own = stream_options(recipe)

    def listed() -> Sequence[Shard]:
        """Return the shards that rank 0 sees: of data that grows, another rank may see more."""
        found = ranks.together(lambda: own.listed() if args.process_index == 0 else ())
        return broadcast_from_rank_0(found, args.world_size)

    return replace(own, listed=listed, saved=saved_position(checkpoint))
