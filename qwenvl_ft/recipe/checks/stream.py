"""What a stream of shards does not go with."""

from collections.abc import Callable

from qwenvl_ft.recipe.checks.argument import argument
from qwenvl_ft.recipe.schema import Recipe
from qwenvl_ft.recipe.values import shown

STARTS_FROM_DATA = ("lora-ga", "eva")
"""Values of ``tuner.init_weights`` that look at training data, which a resumed run would have to read again."""

WHOLE = "looks at all records, which a stream does not have at once"
REFUSED: dict[str, tuple[Callable[[object], bool], str, str]] = {
    "data.split_dataset_ratio": (bool, WHOLE, "Set data.val to files instead"),
    "data.train_dataset_sample": (lambda value: value != -1, WHOLE, "Set training.max_steps instead"),
    "data.train_dataset_mix_ratio": (bool, WHOLE, "Mix the records when the shards are written"),
    "data.check_dataset_strategy": (lambda value: value != "none", WHOLE, "Set data.on_error=skip instead"),
    "training.save_strategy": (lambda value: value == "epoch", "would save after each window", "Use steps"),
    "training.eval_strategy": (lambda value: value == "epoch", "would evaluate after each window", "Use steps"),
    "training.logging_strategy": (lambda value: value == "epoch", "would log after each window", "Use steps"),
    "training.auto_find_batch_size": (bool, "begins anew with other rows", "Set per_device_train_batch_size"),
    "tuner.init_weights": (
        lambda value: value in STARTS_FROM_DATA,
        "starts from records that a resumed run does not read again",
        "Choose another start",
    ),
}
"""Key -> (value -> True if it does not go with a stream, why, what to do)."""


def settings(recipe: Recipe) -> str | None:
    """A stream has no epochs and no list of all its records."""
    data = recipe.data
    if not data.streaming:
        return None
    if isinstance(data.train, dict):
        return (
            "data.train has weights, but data.streaming=true reads all shards at the same rate. Give a list of shards."
        )
    if (argument(recipe, "max_steps") or -1) <= 0:
        return (
            "data.streaming=true: the number of steps is not known before all shards are read. Set training.max_steps."
        )
    for key, (wrong, why, fix) in REFUSED.items():
        section, _, name = key.partition(".")
        value = argument(recipe, name) if section == "training" else getattr(getattr(recipe, section), name)
        if wrong(getattr(value, "value", value)):
            return f"{key}={shown(value)} does not go with data.streaming=true: it {why}. {fix}."
    return None
