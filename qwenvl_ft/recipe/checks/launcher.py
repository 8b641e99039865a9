"""What accelerate's configuration shards, and what the recipe says about it."""

from qwenvl_ft.recipe.checks.argument import argument
from qwenvl_ft.recipe.schema import Recipe
from qwenvl_ft.upstream.launcher import launcher_fsdp_version, launcher_shards

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


def fsdp_version(recipe: Recipe) -> str | None:
    """The first version of FSDP flattens weights, so that nothing that asks for their shapes sees them."""
    config = argument(recipe, "fsdp_config")
    version = config.get("version", config.get("fsdp_version", 2)) if isinstance(config, dict) else 2
    if argument(recipe, "fsdp") and str(version) == "1":
        return "training.fsdp_config.version=1 flattens weights, which is not supported. Set it to 2, or remove it."
    if launcher_shards() == "FSDP" and launcher_fsdp_version() == "1":
        return (
            f"FSDP {OF_LAUNCHER} is of version 1, which flattens weights and is not supported. Set fsdp_version: 2 "
            "there, as recipes/accelerate/fsdp2.yaml does."
        )
    return None
