"""A recipe's file, the files it extends and the overrides -> one checked Recipe that knows where each value came from.

Order: the defaults, then each base in turn, then the file itself, then overrides; the later wins, mappings are merged
key by key. Nothing is written.
"""

import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qwenvl_ft.errors import RecipeError, hint
from qwenvl_ft.recipe.checks import check
from qwenvl_ft.recipe.convert import convert
from qwenvl_ft.recipe.dialects import YAML_NAMES
from qwenvl_ft.recipe.schema import (
    HF_DEFAULTS,
    SECTIONS,
    TOP_LEVEL,
    DataConfig,
    DeepspeedConfig,
    EvaluationConfig,
    ModelConfig,
    TemplateConfig,
    TrainingConfig,
    TunerConfig,
)

Values = dict[str, Any]
OVERRIDE = "override"
PACKAGE_ROOT = Path(__file__).resolve().parents[2]


@dataclass(kw_only=True)
class Recipe:
    """All of a run's settings, typed and checked."""

    model: ModelConfig
    template: TemplateConfig
    data: DataConfig
    tuner: TunerConfig
    training: TrainingConfig
    deepspeed: DeepspeedConfig
    evaluation: EvaluationConfig
    global_max_length: int | None = None
    origins: dict[str, str] = field(default_factory=dict)
    """``section.key`` -> the file that set it, or ``override``; keys that nobody set are not in it."""

    def to_dict(self) -> dict[str, Any]:
        """Sections as in a file: ``training`` flat, the top-level length only if it was given."""
        told: dict[str, Any] = {}
        if self.global_max_length is not None:
            told["global_max_length"] = self.global_max_length
        for name, section in SECTIONS.items():
            values = {f.name: getattr(getattr(self, name), f.name) for f in fields(section)}
            values |= values.pop("arguments", {})
            told[name] = values
        return told

    def save(self, path: str | Path) -> None:
        """Write a recipe file that resolves to this recipe, with the versions that it was resolved by on top."""
        from qwenvl_ft.recipe.provenance import header

        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True, default_flow_style=False)
        partial = target.with_suffix(".partial")
        partial.write_text(header() + text, encoding="utf-8")
        partial.replace(target)


def load_recipe(name_or_path: str | Path | None = None, overrides: Iterable[str] = ()) -> Recipe:
    """Resolve a recipe.

    Args:
        name_or_path: a file, or the name of one in ``recipes/``; None for the defaults alone.
        overrides: ``section.key=value``, the value as in YAML.

    Raises:
        RecipeError: a file is missing or malformed, a key is unknown, or a value is wrong; one line that names file,
            key and value.
    """
    layers = read_layers(find_recipe(name_or_path)) if name_or_path else []
    return build_recipe([*layers, (OVERRIDE, parse_overrides(overrides))])


def find_recipe(name_or_path: str | Path) -> Path:
    """The file of a recipe: a path as it is, a bare name in ./recipes, beside the package, or where it is installed."""
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        if path.is_file():
            return path
        if len(path.parts) > 1:
            raise RecipeError(f"recipe {name_or_path}: there is no such file.")
    folders = recipe_folders()
    for folder in folders:
        for candidate in (folder / path.name, folder / f"{path.name}.yaml"):
            if candidate.is_file():
                return candidate
    known = sorted({file.stem for folder in folders for file in folder.glob("*.yaml")})
    raise RecipeError(f"there is no recipe {str(name_or_path)!r}.{hint(str(name_or_path), known)}")


def recipe_folders() -> list[Path]:
    """Where bare names are looked for, the first wins."""
    return [Path("recipes"), PACKAGE_ROOT / "recipes", Path(sys.prefix) / "share" / "qwenvl_ft" / "recipes"]


def read_layers(path: Path, chain: tuple[Path, ...] = ()) -> list[tuple[str, Values]]:
    """A file's bases and the file itself as (where, values), the weakest first.

    Raises:
        RecipeError: a base is missing, or extends a file that extends it; the chain is printed.
    """
    real = path.resolve()
    if real in chain:
        shown = " -> ".join(str(entry) for entry in (*chain[chain.index(real) :], real))
        raise RecipeError(f"{path}: recipes extend each other in a circle: {shown}.")
    values = read_file(path)
    told = [values.pop(key) for key in ("extends", "inherit") if key in values]
    if len(told) > 1:
        raise RecipeError(f"{path}: both extends and inherit are given. Keep extends.")
    bases = told[0] if told else []
    layers: list[tuple[str, Values]] = []
    for base in [bases] if isinstance(bases, str) else bases or []:
        if not isinstance(base, str):
            raise RecipeError(f"{path}: extends: {base!r} is not a file name.")
        target = path.parent / base
        if not target.is_file():
            raise RecipeError(f"{path}: extends: {target} does not exist. Paths start at the file that names them.")
        layers += read_layers(target, (*chain, real))
    return [*layers, (str(path), normalise(values, str(path)))]


def read_file(path: Path) -> Values:
    """The mapping in a YAML file.

    Raises:
        RecipeError: not YAML (with the line), or not a mapping.
    """
    try:
        loaded = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise RecipeError(f"{path}{line}: not valid YAML: {problem}.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read: {error}.") from None
    if not isinstance(loaded, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of sections: {', '.join(SECTIONS)}.")
    return {str(key): value for key, value in loaded.items()}


def parse_overrides(overrides: Iterable[str]) -> Values:
    """``a.b=c`` entries as nested values."""
    told: Values = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise RecipeError(f"override {override!r} is not section.key=value. Example: training.learning_rate=1e-5.")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            value = text
        put(told, key, value)
    return normalise(told, OVERRIDE)


def put(values: Values, dotted: str, value: Any) -> None:
    """Set a value by its dotted key."""
    *parents, last = dotted.split(".")
    for parent in parents:
        inner = values.setdefault(parent, {})
        if not isinstance(inner, dict):
            raise RecipeError(f"{OVERRIDE} {dotted}: {parent} is {inner!r}, which has no keys.")
        values = inner
    values[last] = value


def normalise(values: Values, where: str) -> Values:
    """One file's values under our own names: aliases of sections and keys replaced, unknown sections refused."""
    told: Values = {}
    for name, content in values.items():
        if name not in TOP_LEVEL:
            raise RecipeError(f"{where}: unknown section {name!r}.{hint(name, TOP_LEVEL)}")
        if name == "global_max_length":
            told[name] = content
            continue
        section = "data" if name == "custom" else name
        if content is None:
            continue
        if not isinstance(content, dict):
            raise RecipeError(f"{where}: {name} is {content!r}, but a section is a mapping of keys.")
        for key, value in content.items():
            put(told, YAML_NAMES.get(f"{section}.{key}", f"{section}.{key}"), value)
    return told


def build_recipe(layers: list[tuple[str, Values]]) -> Recipe:
    """Merge, resolve interpolations, type and check."""
    merged: Values = {}
    origins: dict[str, str] = {}
    for where, values in layers:
        merged = _merge(merged, values, where, origins)
    try:
        merged = OmegaConf.to_container(OmegaConf.create(merged), resolve=True)  # type: ignore[assignment]
    except OmegaConfBaseException as error:
        raise RecipeError(f"recipe: {str(error).splitlines()[0]}.") from None
    length = merged.pop("global_max_length", None)
    if length is not None:
        length = convert(
            length,
            get_type_hints(TemplateConfig, include_extras=True)["max_length"],
            f"{origins['global_max_length']}: global_max_length",
        )
        for key in ("model.max_model_len", "template.max_length"):
            put(merged, key, length)
            origins[key] = origins["global_max_length"]
    told = {name: _section(name, section, merged.get(name, {}), origins) for name, section in SECTIONS.items()}
    recipe = Recipe(**told, global_max_length=length, origins=origins)
    check(recipe)
    return recipe


def _merge(weak: Values, strong: Values, where: str, origins: dict[str, str], prefix: str = "") -> Values:
    merged = dict(weak)
    for key, value in strong.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = _merge(merged[key], value, where, origins, f"{name}.")
        elif isinstance(value, dict):
            merged[key] = _merge({}, value, where, origins, f"{name}.")
        else:
            merged[key] = value
        origins[name] = where
    return merged


def _section(name: str, section: type, values: Values, origins: dict[str, str]) -> Any:
    """A section's dataclass from its values."""
    hints = get_type_hints(section, include_extras=True)
    own = {f.name for f in fields(section)} - {"arguments"}
    told: Values = {}
    foreign: Values = dict(HF_DEFAULTS) if name == "training" else {}
    for key, value in values.items():
        where = f"{origins.get(f'{name}.{key}', 'recipe')}: {name}.{key}"
        if key in own:
            told[key] = convert(value, hints[key], where)
        elif name == "training":
            foreign[key] = _argument(key, value, where, own)
        else:
            raise RecipeError(f"{where}: unknown key.{hint(key, own)}")
    return section(**told, arguments=foreign) if name == "training" else section(**told)


def _argument(key: str, value: Any, where: str, own: set[str]) -> Any:
    """A field of TrainingArguments, by its annotation there."""
    hints = argument_types()
    if key not in hints:
        raise RecipeError(f"{where}: unknown key.{_close(key, own | hints.keys())}")
    return convert(value, hints[key], where)


def _close(key: str, known: Iterable[str]) -> str:
    """The suggestion without the list, which would be all of TrainingArguments."""
    meant = hint(key, known).split(" Known:")[0]
    return f"{meant} docs/reference.md lists all keys."


_TYPES: dict[str, Any] = {}


def argument_types() -> dict[str, Any]:
    """Annotation of every field of TrainingArguments; the import is put off until a recipe has one."""
    if not _TYPES:
        from transformers import TrainingArguments

        hints = get_type_hints(TrainingArguments)
        _TYPES.update({f.name: hints[f.name] for f in fields(TrainingArguments) if f.init})
    return _TYPES


def as_text(value: Any) -> str:
    """A value on one line, as a recipe would have it."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
