"""Datasets, lengths and packing."""

import re

from qwenvl_ft.errors import hint
from qwenvl_ft.recipe.checks.argument import argument
from qwenvl_ft.recipe.dialects import TOKEN_PIXELS
from qwenvl_ft.recipe.image_keys import IMAGE_KEYS, image_keys_fault
from qwenvl_ft.recipe.schema import Recipe

SAMPLING = ("random", "group_by_length")
"""Values of ``training.train_sampling_strategy`` that we support: how rows are ordered into steps."""
DATASET_KEYS = ("annotation_path", "data_path", "reader", *IMAGE_KEYS)


def sampling(recipe: Recipe) -> str | None:
    """Rows are planned, so only the supported orders are possible."""
    strategy = argument(recipe, "train_sampling_strategy")
    if strategy in (None, *SAMPLING):
        return None
    return (
        f"training.train_sampling_strategy={strategy} cannot be honoured: the rows of each epoch are planned from "
        f"sample lengths. Use {' or '.join(SAMPLING)}."
    )


def lengths(recipe: Recipe) -> str | None:
    """The model must be prepared for the longest sample."""
    length, prepared = recipe.template.max_length, recipe.model.max_model_len
    if prepared is None or length <= prepared:
        return None
    return (
        f"template.max_length={length} exceeds model.max_model_len={prepared}. Lower the first or raise the second, "
        "or set both by global_max_length."
    )


def areas(recipe: Recipe) -> str | None:
    """A minimum must not exceed its maximum, and an image must fit into a sample."""
    template = recipe.template
    for least, most in (
        ("min_pixels", "max_pixels"),
        ("video_min_pixels", "video_max_pixels"),
        ("fps_min_frames", "fps_max_frames"),
    ):
        smallest, largest = getattr(template, least), getattr(template, most)
        if smallest is not None and largest is not None and smallest > largest:
            return f"template.{least}={smallest} is above template.{most}={largest}. Lower the first."
    for name, pixels in (("min_pixels", template.min_pixels), ("max_pixels", template.max_pixels)):
        if pixels is not None and pixels // TOKEN_PIXELS >= template.max_length:
            return (
                f"template.{name}={pixels} lets one image take {pixels // TOKEN_PIXELS} tokens, but "
                f"template.max_length={template.max_length}. Lower the first or raise the second."
            )
    return None


def datasets(recipe: Recipe) -> str | None:
    """Registered datasets need a file, have only known keys, and say consistently how images are read."""
    if fault := image_keys_fault(vars(recipe.data), "data."):
        return fault
    for name, entry in recipe.data.datasets.items():
        unknown = [key for key in entry if key not in DATASET_KEYS]
        if unknown:
            return f"data.datasets.{name}: unknown key {unknown[0]!r}.{hint(unknown[0], DATASET_KEYS)}"
        if "annotation_path" not in entry:
            return f"data.datasets.{name} has no annotation_path. Example: {name}: {{annotation_path: a.jsonl}}."
        if wrong := [
            key for key in ("annotation_path", "data_path", "reader") if not isinstance(entry.get(key, ""), str)
        ]:
            return f"data.datasets.{name}.{wrong[0]}={entry[wrong[0]]!r:.80} must be a text."
        if fault := image_keys_fault(entry, f"data.datasets.{name}."):
            return fault
    return None


def names_of_validation_sets(recipe: Recipe) -> str | None:
    """The names of validation sets become part of a metric's name."""
    for name in recipe.data.val if isinstance(recipe.data.val, dict) else ():
        if not re.fullmatch(r"\w+", name):
            return (
                f"data.val has a set named {name!r}, which cannot be part of eval_NAME_loss. Use only letters, digits "
                "and '_'."
            )
    return None


def packing(recipe: Recipe) -> str | None:
    """Packing joins whole samples without padding."""
    training = recipe.training
    if not training.packing:
        return None
    if training.pack_dataset_break_mode == "break":
        return (
            "training.pack_dataset_break_mode=break would cut samples, and images with them. Use no_break_longest_only."
        )
    if not training.padding_free:
        return "training.padding_free=false pads each sample to a row of its own. Set training.packing=false too."
    return None
