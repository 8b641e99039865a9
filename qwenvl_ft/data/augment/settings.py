"""Read and check the ``augmentation`` section of a recipe."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar, get_type_hints

from qwenvl_ft.data.augment.operations import OPERATIONS, Operation
from qwenvl_ft.data.augment.ranges import check_share
from qwenvl_ft.data.augment.render import Colour
from qwenvl_ft.errors import RecipeError, hint
from qwenvl_ft.recipe.limits import Positive
from qwenvl_ft.recipe.values import convert

T = TypeVar("T")


@dataclass(kw_only=True)
class Settings:
    """The keys of the ``augmentation`` section."""

    enabled: bool = True
    """False turns augmentation off while the section stays in the recipe."""
    ops: list[Any] = field(default_factory=list)
    """Operations in order, each as {name: ..., params: {...}}, {rotate: {...}}, or just a name."""
    phases: list[Any] = field(default_factory=list)
    """A schedule, instead of ops: [{until_epoch: 1, ops: [...]}, ..., {ops: [...]}]."""
    bypass_prob: float = 0.0
    """Share of the records that stay unchanged."""
    min_visible: float = 0.3
    """Drop objects of which a smaller share (of area or length) would stay in the frame."""
    fill: int | list[int] = 128
    """Grey level or [red, green, blue] of areas outside the image; 128 is about 0 after normalisation."""

    def __post_init__(self) -> None:
        check_share("bypass_prob", self.bypass_prob)
        check_share("min_visible", self.min_visible)
        if self.ops and self.phases:
            raise RecipeError("both ops and phases are given. Move the ops into the phases.")
        levels = [self.fill] if isinstance(self.fill, int) else self.fill
        if len(levels) not in (1, 3) or not all(0 <= level <= 255 for level in levels):
            raise RecipeError(f"fill: {self.fill} is neither a level from 0 to 255 nor a list of three.")

    @property
    def colour(self) -> Colour:
        """``fill`` as RGB."""
        red, green, blue = [self.fill] * 3 if isinstance(self.fill, int) else self.fill * (3 // len(self.fill))
        return red, green, blue


@dataclass(frozen=True, kw_only=True)
class Phase:
    """The operations of a range of epochs."""

    ops: tuple[Operation, ...]
    until_epoch: int | None = None
    """First epoch, counted from 0, after this phase; None for the last phase."""


@dataclass(kw_only=True)
class _PhaseKeys:
    """The keys of an entry of ``phases``."""

    ops: list[Any] = field(default_factory=list)
    until_epoch: Positive | None = None


def read_settings(config: Mapping[str, Any], where: str) -> tuple[Settings, tuple[Phase, ...]]:
    """Return the settings of the section, and its phases (a single one if there is no schedule).

    Raises:
        RecipeError: an operation, a parameter or a value is wrong; the message names its place.
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
        raise RecipeError(f"{where}.phases: until_epoch must increase from phase to phase, but is {limits}.")
    return settings, tuple(phases)


def _operations(entries: Sequence[Any], where: str) -> tuple[Operation, ...]:
    return tuple(_operation(entry, f"{where}[{index}]") for index, entry in enumerate(entries))


def _operation(entry: Any, where: str) -> Operation:
    """Build the operation of one entry of ``ops``: a name, {name, params}, or {name: params}."""
    if isinstance(entry, str):
        entry = {"name": entry}
    if not isinstance(entry, Mapping) or not entry or ("name" not in entry and len(entry) != 1):
        raise RecipeError(f"{where}: {entry!r} is not an operation. Write {{name: rotate, params: {{max_deg: 8}}}}.")
    if "name" in entry:
        if unknown := sorted(str(key) for key in entry.keys() - {"name", "params"}):
            raise RecipeError(f"{where}: unknown key {unknown[0]} beside name. Parameters belong in params.")
        name, params = entry["name"], entry["params"] if "params" in entry else {}
    else:
        ((name, params),) = entry.items()
    if not isinstance(name, str) or name not in OPERATIONS:
        raise RecipeError(f"{where}: unknown operation {name!r}.{hint(str(name), OPERATIONS)}")
    return _build(OPERATIONS[name], {} if params is None else params, f"{where} {name}")


def _build(kind: type[T], values: Any, where: str) -> T:
    """Build a dataclass from a mapping, with each value converted to the type of its field."""
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
    except RecipeError as error:  # raised by the dataclass, which does not know its place in the recipe
        raise RecipeError(f"{where}: {error}") from None
