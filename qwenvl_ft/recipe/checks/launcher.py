"""What accelerate's configuration shards, and what the recipe says about it."""

from qwenvl_ft.recipe.checks.argument import argument
from qwenvl_ft.recipe.schema import Recipe
from qwenvl_ft.upstream.launcher import launcher_shards

OF_LAUNCHER = "in accelerate's configuration"


def sharded_by(recipe: Recipe) -> str | None:
    """Return what shards the model, for messages; None if every process holds all of it."""
    if recipe.deepspeed.enabled:
        return "deepspeed"
    if argument(recipe, "fsdp"):
        return "training.fsdp"
    return f"{shards} {OF_LAUNCHER}" if (shards := launcher_shards()) else None


def one_sharding(recipe: Recipe) -> str | None:
    """accelerate's configuration may shard by FSDP if the recipe leaves that to it, but not by DeepSpeed."""
    shards = launcher_shards()
    if shards is None:
        return None
    own = (
        "deepspeed.enabled=true" if recipe.deepspeed.enabled else "training.fsdp" if argument(recipe, "fsdp") else None
    )
    if shards == "FSDP" and own is not None:
        return f"{own} and FSDP {OF_LAUNCHER} both shard the model. Remove one of them."
    if shards == "DeepSpeed" and not recipe.deepspeed.enabled:
        return (
            f"DeepSpeed {OF_LAUNCHER} is not checked against the recipe: it may clip, round or optimise otherwise. Set "
            "deepspeed.enabled=true and deepspeed.config to zero2, zero3 or your file, and remove DeepSpeed there."
        )
    return None
