"""Which settings exclude or outweigh each other, so that the order of keys never decides?

Within a layer (one file, or the command line) two settings that disagree are an error, unless the libraries that they
come from document which one wins. A stronger layer replaces all that a weaker one sets of the same group.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qwenvl_ft.errors import RecipeError
from qwenvl_ft.recipe.dialects import ALIASES
from qwenvl_ft.recipe.keys import own_types, type_of
from qwenvl_ft.recipe.schema import HF_DEFAULTS, SECTIONS
from qwenvl_ft.recipe.values import convert, shown

if TYPE_CHECKING:
    from qwenvl_ft.recipe.layers import Layer

Setting = tuple[str, Any]
"""How a key was spelled, and the value given to it."""
STRONGER_NAMES = {"training.warmup_steps": ("warmup_steps",)}
"""Key -> its names that outweigh all its other names within a layer, the strongest first: transformers prefers
``warmup_steps`` to ``warmup_ratio``."""
PLACEHOLDERS = ("placeholder", "custom", "dummy", "none", "null")
"""Names of data that say nothing: ms-swift's ``--dataset`` wants one even where ``--jsonl`` names the file."""
YIELDING = {"training.warmup_steps": ("0", "0.0"), "data.train": PLACEHOLDERS, "data.val": PLACEHOLDERS}
"""Key -> its values, as text in lower case, that say nothing, so that any of its other names outweighs them."""
NOTHING: tuple[Any, ...] = (None, False, "", [], {})
"""Values that switch a key of a group off, so that it excludes no other."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """Keys of which one run can use only one."""

    keys: tuple[str, ...]
    """Dotted keys."""
    why: str
    """The reason, for the error message."""
    off: tuple[Any, ...] = NOTHING
    """Values with which a key of the group takes no part in it."""
    first_wins: bool = False
    """True if the first key outweighs the others within a layer, as transformers or ms-swift documents."""


GROUPS = (
    Group(
        keys=("training.max_steps", "training.num_train_epochs"),
        why="both set the length of the run",
        off=(*NOTHING, -1),
        first_wins=True,
    ),
    Group(keys=("training.bf16", "training.fp16"), why="both set the precision of computation"),
    Group(keys=("deepspeed.enabled", "training.fsdp", "model.device_map"), why="each of them places the model itself"),
    Group(
        keys=("tuner.target_regex", "tuner.target_modules"),
        why="both choose the modules that get an adapter",
        first_wins=True,
    ),
    Group(
        keys=("data.val", "data.split_dataset_ratio"),
        why="both choose the evaluation data",
        off=(*NOTHING, 0),
        first_wins=True,
    ),
    Group(keys=("tuner.boft_block_num", "tuner.boft_block_size"), why="both set the blocks of BOFT", off=(0,)),
)
"""Keys that exclude each other. (``global_max_length`` and the lengths that it sets: `set_lengths`.)"""
LENGTHS = ("model.max_model_len", "template.max_length")
"""Keys that ``global_max_length`` sets."""


def settle(layer: Layer) -> None:
    """Choose the value of each key that a layer sets under several names, whatever their order.

    Raises:
        RecipeError: two of them disagree, and no rule says which one wins.
    """
    for key, settings in layer.settings.items():
        for inner in (other for other in layer.settings if other.startswith(f"{key}.")):
            both = sorted((settings[-1][0], layer.settings[inner][-1][0]))
            raise RecipeError(f"{layer.where}: {' and '.join(both)} are both set. Set the whole mapping, or its keys.")
        latest = {_name(spelled): (spelled, value) for spelled, value in settings} if layer.repeats else {}
        different = list(latest.values()) or settings
        if len(different) > 1:
            layer.choose(key, *_strongest(key, different, layer.where))


def _strongest(key: str, settings: list[Setting], where: str) -> Setting:
    """Return the setting that outweighs all others of its key in a layer."""
    typed = [(spelled, _typed(key, value, where)) for spelled, value in settings]
    nothing = YIELDING[key] if key in YIELDING else ()
    saying = [number for number, (_, value) in enumerate(typed) if str(value).lower() not in nothing]
    saying = saying or list(range(len(typed)))
    best = min(_rank(key, typed[number][0]) for number in saying)
    first, *others = (number for number in saying if _rank(key, typed[number][0]) == best)
    for number in others:
        if not _same(typed[first][1], typed[number][1]):
            raise _disagreement(where, [typed[first], typed[number]], f"both set {key}")
    return settings[first]


def _name(spelled: str) -> str:
    """Return the name of a key without ``--`` and without its section."""
    name = spelled.removeprefix("--")
    section, _, inner = name.partition(".")
    return inner if section in (*SECTIONS, "custom") else name


def _rank(key: str, spelled: str) -> int:
    """Return the place of a name among the stronger names of its key, 0 for the strongest."""
    names = STRONGER_NAMES[key] if key in STRONGER_NAMES else ()
    return names.index(_name(spelled)) if _name(spelled) in names else len(names)


def _typed(key: str, value: Any, where: str) -> Any:
    """Return a value converted to the type of its key, or as it is if it cannot be (the loader says why)."""
    kind = type_of(key)
    try:
        return value if kind is None else convert(value, kind, where)
    except RecipeError:
        return value


def _same(one: Any, other: Any) -> bool:
    return bool(one == other) and isinstance(one, bool) == isinstance(other, bool)


def _disagreement(where: str, settings: Iterable[Setting], why: str) -> RecipeError:
    """Return the error for settings that exclude each other, in an order that does not depend on theirs."""
    listed = " and ".join(sorted(_as_given(spelled, value) for spelled, value in settings))
    return RecipeError(f"{where}: {listed} exclude each other: {why}. Keep one.")


def _as_given(spelled: str, value: Any) -> str:
    """Return a setting for a message. The value of a converting alias is that of its key, and not what was typed."""
    name = _name(spelled)
    converts = name in ALIASES and ALIASES[name].effect
    return f"{spelled} (which sets {shown(value)})" if converts else f"{spelled}={shown(value)}"


def outweighed(layer: Layer) -> list[str]:
    """Return the keys that the settings of a layer outweigh, in itself and in all weaker layers.

    Raises:
        RecipeError: two keys of a group are set in this layer.
    """
    return [key for group in GROUPS for key in _outweighed_in(group, layer)]


def _outweighed_in(group: Group, layer: Layer) -> list[str]:
    values = {key: _typed(key, layer.get(key), layer.where) for key in group.keys if key in layer.settings}
    active = [key for key, value in values.items() if not any(_same(value, off) for off in group.off)]
    if not active:
        return []
    chosen = [key for key in active if values[key] != _default(key)]  # a saved recipe also holds the defaults
    if len(chosen) > 1 and not group.first_wins:
        raise _disagreement(layer.where, [(layer.settings[key][-1][0], values[key]) for key in chosen], group.why)
    winner = (active if group.first_wins else chosen or active)[0]
    return [key for key in group.keys if key != winner]


def _default(key: str) -> Any:
    section, _, name = key.partition(".")
    if name in own_types(section):
        return getattr(SECTIONS[section](), name)
    return HF_DEFAULTS[name] if name in HF_DEFAULTS else None


def set_lengths(layers: Iterable[Layer]) -> list[Layer]:
    """Return the layers, with the lengths that the strongest ``global_max_length`` sets and outweighs in its layer.

    A stronger layer may still set each of them.
    """
    expanded = list(layers)
    for number in reversed(range(len(expanded))):
        layer = expanded[number]
        if "global_max_length" in layer.settings:
            length = layer.get("global_max_length")
            if _typed("global_max_length", length, layer.where) is not None:
                expanded[number] = layer.with_values(dict.fromkeys(LENGTHS, length), "global_max_length")
            break
    return expanded
