"""Hybrid sharding (HSDP): FSDP2 shards the model over some ranks, such as those of a node, and each such group holds a
copy of it.

accelerate builds the mesh. The ranks of a node have consecutive numbers, so a shard of as many ranks as a node has lies
within the node: only gradients, once a step, cross the network between nodes.
"""

import os
from typing import Any

from qwenvl_ft.errors import RecipeError
from qwenvl_ft.upstream.launcher import launcher_mesh_size, mesh_variable

KEY = "training.parallelism_config"
SIZES = ("dp_replicate_size", "dp_shard_size")
"""Keys of ``training.parallelism_config``: number of copies, and ranks that share a copy."""
_LARGE_MODEL = "to share out a large model: training.fsdp=full_shard or deepspeed.config=zero3"
_LONG_ROWS = "to share out long rows: training.sequence_parallel_size"
OTHER_SIZES = {
    "tp": ("tensor", _LARGE_MODEL),
    "cp": ("context", _LONG_ROWS),
    "sp": ("sequence", _LONG_ROWS),
}
"""Dimension of accelerate's mesh that this package does not train with -> its name, and what to use instead."""


def mesh_sizes(sizes: dict[str, int], world_size: int) -> dict[str, int]:
    """Return both `SIZES`; one that is not given follows from the number of ranks.

    Example:
        ``dp_shard_size: 8`` on 32 ranks is four copies, each over 8 ranks.

    Raises:
        RecipeError: their product is not the number of ranks, or nothing would be sharded.
    """
    shown = ", ".join(f"{name}={size}" for name, size in sizes.items())
    copies, shard = (sizes[name] if name in sizes else world_size // max(sizes.values()) for name in SIZES)
    if copies * shard != world_size:
        raise RecipeError(
            f"{KEY} has {shown}, but the run has {world_size} ranks: copies (dp_replicate_size) times ranks of a copy "
            "(dp_shard_size) must be all ranks. Set dp_shard_size to the number of ranks of a node."
        )
    if shard == 1:
        raise RecipeError(
            f"{KEY} has {shown} on {world_size} ranks: each would hold a whole copy, which is DDP. Remove it together "
            "with training.fsdp."
        )
    return {"dp_replicate_size": copies, "dp_shard_size": shard}


def parallelism(sizes: dict[str, int] | None) -> Any:
    """Return accelerate's ParallelismConfig for ``training.parallelism_config``; None if it is not set.

    Raises:
        RecipeError: the sizes do not fit the number of ranks.
    """
    if not sizes:
        return None
    from accelerate.parallelism_config import ParallelismConfig

    return ParallelismConfig(**mesh_sizes(sizes, int(os.environ.get("WORLD_SIZE", "1"))))


def require_data_parallel() -> None:
    """Raise RecipeError if accelerate's launcher asks for a mesh that splits layers or samples, which is not trained
    here."""
    for name, (kind, instead) in OTHER_SIZES.items():
        size = launcher_mesh_size(name)
        if size > 1:
            raise RecipeError(
                f"accelerate's {kind} parallelism ({mesh_variable(name)}={size}) is not supported. Remove it from "
                f"accelerate's configuration; {instead}."
            )
