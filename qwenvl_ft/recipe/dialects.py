"""The names that other tools have for our keys: ms-swift's and train_qwen.py's flags, older spellings in YAML.

Both are tables. A flag that is in neither and is no field of TrainingArguments is an error with a suggestion.
"""

import re
from collections.abc import Callable
from typing import Any

import yaml

from qwenvl_ft.errors import RecipeError, hint

Values = dict[str, Any]

YAML_NAMES = {
    "data.train_jsonl": "data.train",
    "data.jsonl": "data.train",
    "data.val_jsonl": "data.val",
    "template.template_type": "template.template",
    "training.gradient_checkpointing": "training.activation_checkpointing",
    "training.gradient_checkpointing_kwargs": "training.activation_checkpointing_kwargs",
    "training.warmup_ratio": "training.warmup_steps",  # below 1 it is a ratio
    "training.evaluation_strategy": "training.eval_strategy",
}
"""Spelling in a file -> our key."""


def same(key: str) -> Callable[[Any], Values]:
    """The flag's value under our key."""
    return lambda value: {key: value}


def negated(key: str) -> Callable[[Any], Values]:
    """A flag that trains what our key freezes."""
    return lambda value: {key: not truth(value)}


def truth(value: Any) -> bool:
    """A flag's truth value.

    Raises:
        RecipeError: it is neither true nor false.
    """
    from qwenvl_ft.recipe.convert import convert

    return convert(value, bool, "flag")


def _train_type(value: Any) -> Values:
    return {"tuner.train_type": "lora" if truth(value) else "full"}


def _optimizer(value: Any) -> Values:
    """``multimodal`` groups parameters by part; any other name is an algorithm."""
    return {"training.optimizer": value} if value == "multimodal" else {"training.optim": value}


def _deepspeed(value: Any) -> Values:
    return {"deepspeed.enabled": True, "deepspeed.config": value}


def _flatten(value: Any) -> Values:
    """``data_flatten`` joins the samples of a batch into one row."""
    return {"training.padding_free": truth(value)} | ({"training.packing": False} if truth(value) else {})


RENAMED = {
    # ms-swift
    "model": "model.model",
    "dataset": "data.train",
    "val_dataset": "data.val",
    "jsonl": "data.train",
    "val_jsonl": "data.val",
    "system": "template.system_prompt",
    "template_type": "template.template",
    "sft_type": "tuner.train_type",
    "tuner_type": "tuner.train_type",
    # train_qwen.py, qwen-vl-finetune
    "model_name_or_path": "model.model",
    "dataset_use": "data.train",
    "eval_dataset_use": "data.val",
    "model_max_length": "template.max_length",
    "max_seq_length": "template.max_length",
    "lora_r": "tuner.lora_rank",
    "train_modules": "tuner.target_modules",
    "freeze_vision": "tuner.freeze_vit",
    "mm_projector_lr": "training.aligner_lr",
    "vision_tower_lr": "training.vit_lr",
    "data_packing": "training.packing",
    # older spellings of TrainingArguments
    **{name.removeprefix("training."): key for name, key in YAML_NAMES.items() if name.startswith("training.")},
}
"""Flag -> our key, the value as it is."""

TRANSFORMED: dict[str, Callable[[Any], Values]] = {
    "use_lora": _train_type,
    "lora_enable": _train_type,
    "tune_mm_llm": negated("tuner.freeze_llm"),
    "tune_mm_vision": negated("tuner.freeze_vit"),
    "tune_mm_mlp": negated("tuner.freeze_aligner"),
    "train_mlp": negated("tuner.freeze_aligner"),
    "data_flatten": _flatten,
    "optimizer": _optimizer,
    "deepspeed": _deepspeed,
}
"""Flag -> what it says in our keys."""


def own_flags() -> dict[str, str]:
    """Every key of our sections as a flag of its bare name; sections in their order, the first wins."""
    from dataclasses import fields

    from qwenvl_ft.recipe.schema import SECTIONS

    told: dict[str, str] = {}
    for name, section in SECTIONS.items():
        if name in ("deepspeed", "evaluation"):
            continue  # their bare names (enabled, data, limit) say too little
        for entry in fields(section):
            if entry.name != "arguments":
                told.setdefault(entry.name, f"{name}.{entry.name}")
    return told


def flag_values(flag: str, value: Any) -> Values:
    """What ``--flag value`` says, as dotted keys.

    Raises:
        RecipeError: there is no such flag.
    """
    if flag in TRANSFORMED:
        return TRANSFORMED[flag](value)
    if flag in RENAMED:
        return {RENAMED[flag]: value}
    if "." in flag or flag == "global_max_length":
        return {flag: value}
    known = own_flags()
    if flag in known:
        return {known[flag]: value}
    from qwenvl_ft.recipe.load import argument_types

    if flag in argument_types():
        return {f"training.{flag}": value}
    close = hint(flag, [*TRANSFORMED, *RENAMED, *known, *argument_types()]).split(" Known:")[0]
    raise RecipeError(f"unknown flag --{flag}.{close} docs/reference.md lists all keys.")


FILES = {"recipe": "recipe", "config": "recipe", "base_config": "base"}
"""Argument that names a file -> its place in the order."""
OVERRIDE_FORM = re.compile(r"^[A-Za-z_][\w]*(\.[\w-]+)+=")


def recipe_from_argv(argv: list[str]) -> Any:
    """A recipe from a command line: files, ``section.key=value``, and both dialects' flags, mixed in any order.

    ``recipe=NAME|PATH`` or ``--config PATH`` names the recipe, ``--base_config PATH`` one that it outweighs. A flag
    takes the words up to the next flag: none is true, one is its value, several are a list.

    Raises:
        RecipeError: a flag or key is unknown, or a value is wrong.
    """
    from qwenvl_ft.recipe.load import OVERRIDE, build_recipe, find_recipe, normalise, put, read_layers

    files: dict[str, str] = {}
    overrides: Values = {}
    words = list(argv)
    while words:
        word = words.pop(0)
        if word.startswith("--"):
            flag, equals, text = word[2:].partition("=")
            taken = [text] if equals else _take(words)
            value = True if not taken else _value(taken[0]) if len(taken) == 1 else [_value(entry) for entry in taken]
            if flag in FILES:
                files[FILES[flag]] = str(value)
                continue
            for key, told in flag_values(flag.replace("-", "_"), value).items():
                put(overrides, key, told)
            continue
        key, equals, text = word.partition("=")
        if not equals:
            raise RecipeError(
                f"{word!r} is neither section.key=value nor a flag. Example: training.learning_rate=1e-5."
            )
        if key in FILES:
            files[FILES[key]] = text
        elif "." in key or key == "global_max_length":
            put(overrides, key, _value(text))
        else:
            for name, told in flag_values(key, _value(text)).items():
                put(overrides, name, told)
    layers = [
        layer for place in ("base", "recipe") if place in files for layer in read_layers(find_recipe(files[place]))
    ]
    return build_recipe([*layers, (OVERRIDE, normalise(overrides, OVERRIDE))])


def _take(words: list[str]) -> list[str]:
    """The words that belong to a flag."""
    taken: list[str] = []
    while (
        words
        and not words[0].startswith("--")
        and not OVERRIDE_FORM.match(words[0])
        and not words[0].startswith("recipe=")
    ):
        taken.append(words.pop(0))
    return taken


def _value(text: str) -> Any:
    """A word as YAML reads it; what is not YAML stays text."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text
