"""The ``augmentation`` section of a recipe -> operations and settings, every name and value checked."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar, get_type_hints

from qwenvl_ft.data.augment.canvas import Colour
from qwenvl_ft.data.augment.operations import OPERATIONS, Operation
from qwenvl_ft.data.augment.ranges import check_share
from qwenvl_ft.errors import RecipeError, hint
from qwenvl_ft.recipe.limits import Positive
from qwenvl_ft.recipe.values import convert

T = TypeVar("T")


@dataclass(kw_only=True)
class Settings:
    """The keys of the section."""

    enabled: bool = True
    """False keeps the section in the recipe and changes nothing."""
    ops: list[Any] = field(default_factory=list)
    """Operations in order, each {name: ..., params: {...}}, or short {rotate: {...}}, or a bare name."""
    phases: list[Any] = field(default_factory=list)
    """Instead of ops, for a schedule: [{until_epoch: 1, ops: [...]}, ..., {ops: [...]}]."""
    bypass_prob: float = 0.0
    """Share of the records that stay as they are."""
    min_visible: float = 0.3
    """Objects of which less (a share of area or length) would be kept in the frame are dropped."""
    fill: int | list[int] = 128
    """Level, or [red, green, blue], of what no pixel of the image covers; 128 is about 0 for the model."""

    def __post_init__(self) -> None:
        check_share("bypass_prob", self.bypass_prob)
        check_share("min_visible", self.min_visible)
        if self.ops and self.phases:
            raise RecipeError("both ops and phases are given. Move the ops into the phases.")
        levels = [self.fill] if isinstance(self.fill, int) else self.fill
        if len(levels) not in (1, 3) or not all(0 <= level <= 255 for level in levels):
            raise RecipeError(f"fill: {self.fill} is not a level from 0 to 255, nor three of them.")

    @property
    def colour(self) -> Colour:
        red, green, blue = [self.fill] * 3 if isinstance(self.fill, int) else self.fill * (3 // len(self.fill))
        return red, green, blue


@dataclass(frozen=True, kw_only=True)
class Phase:
    """The operations of some epochs."""

    ops: tuple[Operation, ...]
    until_epoch: int | None = None
    """The first epoch, counted from 0, that is not of this phase; None for the last phase."""


@dataclass(kw_only=True)
class _PhaseKeys:
    ops: list[Any] = field(default_factory=list)
    until_epoch: Positive | None = None


def read_settings(config: Mapping[str, Any], where: str) -> tuple[Settings, tuple[Phase, ...]]:
    """The section's settings, and its phases (a single one without a schedule).

    Raises:
        RecipeError: see `Augmenter.from_config`.
    """
    settings = _build(Settings, config, where)
    if not settings.phases:
        return settings, (Phase(ops=_operations(settings.ops, f"{where}.ops")),)
    phases = []
    for index, entry in enumerate(settings.phases):
        at = f"{where}.phases[{index}]"
        keys = _build(_PhaseKeys, entry, at)
        phases.append(Phase(ops=_operations(keys.ops, f"{at}.ops"), until_epoch=keys.until_epoch))
    ends = [phase.until_epoch for phase in phases]
    limits = [end for end in ends[:-1] if end is not None]
    if ends[-1] is not None or len(limits) < len(ends) - 1:
        raise RecipeError(
            f"{where}.phases: until_epoch is {ends}. Every phase but the last needs one, and the last runs to the end; "
            "write {ops: []} for no augmentation at the end."
        )
    if sorted(set(limits)) != limits:
        raise RecipeError(f"{where}.phases: until_epoch must rise from phase to phase, but is {limits}.")
    return settings, tuple(phases)


def _operations(entries: Sequence[Any], where: str) -> tuple[Operation, ...]:
    return tuple(_operation(entry, f"{where}[{index}]") for index, entry in enumerate(entries))


def _operation(entry: Any, where: str) -> Operation:
    """One entry of ``ops``: a bare name, {name, params}, or {name: params}."""
    if isinstance(entry, str):
        entry = {"name": entry}
    if not isinstance(entry, Mapping) or not entry or ("name" not in entry and len(entry) != 1):
        raise RecipeError(f"{where}: {entry!r} is not an operation. Write {{name: rotate, params: {{max_deg: 8}}}}.")
    if "name" in entry:
        if unknown := sorted(str(key) for key in entry.keys() - {"name", "params"}):
            raise RecipeError(f"{where}: {unknown[0]} is not a key beside name. Parameters stand in params.")
        name, params = entry["name"], entry["params"] if "params" in entry else {}
    else:
        ((name, params),) = entry.items()
    if not isinstance(name, str) or name not in OPERATIONS:
        raise RecipeError(f"{where}: unknown operation {name!r}.{hint(str(name), OPERATIONS)}")
    return _build(OPERATIONS[name], {} if params is None else params, f"{where} {name}")


def _build(kind: type[T], values: Any, where: str) -> T:
    """A dataclass from a mapping, each value in its field's type."""
    if not isinstance(values, Mapping):
        raise RecipeError(f"{where}: {values!r} is not a mapping of keys to values.")
    hints = get_type_hints(kind, include_extras=True)
    known = {f.name for f in fields(kind)}  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            raise RecipeError(f"{where}: unknown key {key!r}.{hint(str(key), known)}")
    converted = {key: convert(value, hints[key], f"{where}.{key}") for key, value in values.items()}
    try:
        built = kind(**converted)
        if (prob := getattr(built, "prob", None)) is not None:
            check_share("prob", prob)
        return built
    except RecipeError as error:  # a check of the dataclass, which does not know where it stands
        raise RecipeError(f"{where}: {error}") from None
