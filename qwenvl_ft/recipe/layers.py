"""Where recipe files are, and what each says under our own names: a file and those it extends, the weakest first."""

import os
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qwenvl_ft.errors import RecipeError, hint
from qwenvl_ft.recipe.dialects import ENVIRONMENT, alias_in, flag_values
from qwenvl_ft.recipe.keys import own_types
from qwenvl_ft.recipe.schema import SECTIONS, TOP_LEVEL
from qwenvl_ft.recipe.values import parse_text, shown

Values = dict[str, Any]
OVERRIDE = "override"
ENVIRONMENT_LAYER = "environment"
PACKAGE_ROOT = Path(__file__).resolve().parents[2]
SUFFIXES = (".yaml", ".yml")
PHASE_EXAMPLE = (
    "Example: phases: [{name: simple, data: {train: simple.jsonl}}, {name: full, data: {train: all.jsonl}}]."
)
RUN_KEYS = {
    "model.model": "is for the first phase and stands outside of phases: each goes on from the one before.",
    "tuner.resume_from_checkpoint": "is for the first phase and stands outside of phases: each goes on from the one "
    "before.",
    "training.output_dir": "is one for all phases, which have a folder each in it. Set it outside of phases.",
    "training.resume_from_checkpoint": "is one for all phases. Set it outside of phases.",
    "training.save_final": "is one for all phases. Set it outside of phases.",
}
"""Key that a phase cannot have -> what is said of it."""
DOTTED = ("model.device_map",)
"""Mappings whose keys have dots of their own."""


@dataclass
class Layer:
    """What one file, or the command line, sets."""

    where: str
    """The file, or ``override``."""
    values: Values = field(default_factory=dict)
    """Our sections -> keys -> values."""
    spelled: dict[str, str] = field(default_factory=dict)
    """Our dotted key -> the name that it was given by, where that is another."""
    phases: "dict[str, Layer] | None" = None
    """Name -> what a phase says; None if nothing is said of phases. A file's are all; overrides change some."""

    def set(self, key: str, value: Any, spelled: str) -> None:
        """Set a value by its dotted key; the last one counts."""
        *parents, last = _steps(key)
        values = self.values
        for parent in parents:
            inner = values.setdefault(parent, {})
            if not isinstance(inner, dict):
                raise RecipeError(f"{self.where}: {spelled}: {parent} is {inner!r} there, which has no keys.")
            values = inner
        values[last] = value
        self.spelled.pop(key, None)
        if spelled != key:
            self.spelled[key] = spelled

    def put(self, section: str, name: str, value: Any) -> None:
        """Set ``section.name``, which may be another name for a key of ours."""
        spelled = f"{section}.{name}"
        section = "data" if section == "custom" else section
        alias = alias_in(section, name)
        if alias is None:
            self.set(f"{section}.{name}", value, spelled)
            return
        for key, told in alias.meaning(value, f"{self.where}: {spelled}").items():
            self.set(key, told, spelled)


def _steps(key: str) -> list[str]:
    """A dotted key as the keys of nested mappings."""
    for mapping in DOTTED:
        if key.startswith(f"{mapping}."):
            return [*mapping.split("."), key.removeprefix(f"{mapping}.")]
    return key.split(".")


def find_recipe(name_or_path: str | Path) -> Path:
    """The file of a recipe: a path as it is, a bare name in ./recipes, beside the package, or where it is installed.

    Raises:
        RecipeError: there is none.
    """
    path = Path(name_or_path).expanduser()
    if not path.name:
        raise RecipeError(f"recipe={name_or_path} names no recipe. Example: recipe=lora_4b.")
    bare = len(path.parts) == 1
    candidates = [path] if path.suffix in SUFFIXES or not bare else []
    folders = recipe_folders() if bare else [Path()]
    candidates += [folder / name for folder in folders for name in (path.name, f"{path.name}.yaml")] if bare else []
    candidates += [] if bare else [path.with_name(f"{path.name}.yaml")]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    if not bare:
        raise RecipeError(f"recipe {name_or_path}: there is no such file.")
    known = sorted({file.stem for folder in folders for file in folder.glob("*.yaml")})
    raise RecipeError(f"there is no recipe {str(name_or_path)!r}.{hint(path.stem, known)}")


def recipe_folders() -> list[Path]:
    """Where bare names are looked for, the first wins."""
    return [Path("recipes"), PACKAGE_ROOT / "recipes", Path(sys.prefix) / "share" / "qwenvl_ft" / "recipes"]


def read_layers(path: Path, chain: tuple[Path, ...] = ()) -> list[Layer]:
    """A file's bases and the file itself, the weakest first.

    A base counts as a whole: with ``extends: [a, b]`` all that ``b`` says, or inherits, outweighs ``a``.

    Raises:
        RecipeError: a base is missing, or extends a file that extends it; the chain is printed.
    """
    real = path.resolve()
    if real in chain:
        shown = " -> ".join(str(entry) for entry in (*chain[chain.index(real) :], real))
        raise RecipeError(f"{path}: recipes extend each other in a circle: {shown}.")
    values = read_file(path)
    layers: list[Layer] = []
    for base in _bases(path, values):
        layers += read_layers(base, (*chain, real))
    return [*layers, _layer(str(path), values)]


def _bases(path: Path, values: Values) -> list[Path]:
    """The files that ``extends`` names, which is taken out of ``values``."""
    told = [values.pop(key) for key in ("extends", "inherit") if key in values]
    if len(told) > 1:
        raise RecipeError(f"{path}: both extends and inherit are given. Keep extends.")
    names = told[0] if told and told[0] is not None else []
    bases: list[Path] = []
    for name in names if isinstance(names, list) else [names]:
        if not isinstance(name, str):
            raise RecipeError(
                f"{path}: extends: {name!r} is not a file name. Example: extends: [base.yaml, mine.yaml]."
            )
        base = path.parent / Path(name).expanduser()
        if not base.is_file():
            raise RecipeError(f"{path}: extends: there is no {base}.{_elsewhere(path, base)}")
        bases.append(base)
    return bases


def _elsewhere(path: Path, missing: Path) -> str:
    """Where the missing base may be."""
    for folder in recipe_folders():
        shipped = folder / missing.name
        if shipped.is_file():
            return f" Did you mean {shipped.resolve()}? Paths start at the folder of {path.name}."
    known = [file.name for file in missing.parent.glob("*.yaml") if file.name != path.name]
    close = hint(missing.name, known).split(" Known:")[0]
    return f"{close} Paths start at the folder of {path.name}."


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
        if not isinstance(error, OSError) or error.errno is not None:
            raise RecipeError(f"{path}: cannot be read: {error}.") from None
        loaded = None  # OmegaConf's answer to a file that holds one bare word
    if not isinstance(loaded, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of sections: {', '.join(SECTIONS)}.")
    return {str(key): value for key, value in loaded.items()}


def _layer(where: str, values: Values) -> Layer:
    """One file's values under our own names; unknown sections are refused."""
    layer = Layer(where)
    for section, content in values.items():
        if section not in TOP_LEVEL:
            raise RecipeError(f"{where}: unknown section {section!r}.{_section_hint(section)}")
        if section == "global_max_length":
            layer.set(section, content, section)
        elif section == "phases":
            layer.phases = _phases(where, content)
        elif isinstance(content, dict):
            for name, value in content.items():
                layer.put(section, str(name), value)
        elif content is not None:
            raise RecipeError(f"{where}: {section} is {shown(content)}, but a section is a mapping of keys.")
    return layer


def _phases(where: str, content: Any) -> dict[str, Layer]:
    """The phases of a file in their order; a phase without a name has its number for one."""
    if content is None:
        return {}
    if not isinstance(content, list):
        raise RecipeError(f"{where}: phases is {shown(content)}, but it is a list. {PHASE_EXAMPLE}")
    phases: dict[str, Layer] = {}
    for number, entry in enumerate(content, 1):
        if not isinstance(entry, dict):
            raise RecipeError(f"{where}: phase {number} is {shown(entry)}, not a mapping of sections. {PHASE_EXAMPLE}")
        values = {str(key): value for key, value in entry.items()}
        name = str(values.pop("name", number))
        label = f"{where}: phase {number}" + (f" ({name})" if name != str(number) else "")
        if not re.fullmatch(r"[A-Za-z]\w*|\d+", name) or (name.isdigit() and name != str(number)):
            raise RecipeError(f"{label}: a name begins with a letter, followed by letters, digits and _, as medium.")
        if name in phases:
            raise RecipeError(f"{label}: another phase has that name. Names differ.")
        for key in ("extends", "inherit", "phases"):
            if key in values:
                raise RecipeError(f"{label}: {key} stands at the top of a recipe, not in a phase.")
        phases[name] = _layer(label, values)
        _require_own_run(phases[name])
    return phases


def _require_own_run(layer: Layer) -> None:
    """Refuse in a phase what is one for the whole run."""
    for key, why in RUN_KEYS.items():
        section, _, name = key.partition(".")
        if section in layer.values and name in layer.values[section]:
            raise RecipeError(f"{layer.where}: {key} {why}")


def _section_hint(name: str) -> str:
    """What was meant by an unknown key at the top; it may be one that belongs into a section."""
    homes = [section for section in SECTIONS if name in own_types(section)]
    return f" Did you mean {homes[0]}.{name}?" if homes else hint(name, TOP_LEVEL)


def environment_layer() -> Layer:
    """What the environment variables of other libraries say about areas and frames."""
    layer = Layer(ENVIRONMENT_LAYER)
    for variable, name in ENVIRONMENT.items():
        if os.environ.get(variable):
            for key, told in flag_values(name, os.environ[variable], f"{layer.where}: {variable}").items():
                layer.set(key, told, variable)
    return layer


def override_layer(overrides: Iterable[str]) -> Layer:
    """``section.key=value`` entries as a layer.

    Raises:
        RecipeError: an entry has another form, or no such section.
    """
    layer = Layer(OVERRIDE)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise RecipeError(f"override {override!r} is not section.key=value. Example: training.learning_rate=1e-5.")
        set_override(layer, key, text)
    return layer


def _inside(section: str, name: str) -> str:
    """Our dotted key of one that begins with another name of a mapping."""
    section = "data" if section == "custom" else section
    mapping, _, inner = name.partition(".")
    alias = alias_in(section, mapping)
    return f"{section}.{name}" if alias is None or alias.kind is not None else f"{alias.keys[0]}.{inner}"


def set_override(layer: Layer, key: str, value: Any) -> None:
    """Set one dotted key from the command line. Text keeps its spelling: the field's type says how it is read."""
    section, dot, name = key.partition(".")
    if key == "global_max_length":
        layer.set(key, value, key)
    elif section == "phases":
        _override_phase(layer, name, value, key)
    elif key in ("extends", "inherit"):
        raise RecipeError(f"{OVERRIDE}: {key} stands in a file. Name a weaker recipe by base_config={value}.")
    elif section not in (*SECTIONS, "custom"):
        raise RecipeError(f"{OVERRIDE}: unknown key {key!r}.{_section_hint(section)}")
    elif not dot:
        raise RecipeError(f"{OVERRIDE}: {section} is a section. Give one of its keys: {section}.key=value.")
    elif "." in name:  # inside a mapping, where no type is known
        layer.set(_inside(section, name), parse_text(value) if isinstance(value, str) else value, key)
    else:
        layer.put(section, name, value)


def _override_phase(layer: Layer, name: str, value: Any, spelled: str) -> None:
    """``phases.NAME.section.key`` from the command line."""
    phase, _, key = name.partition(".")
    if not key:
        raise RecipeError(
            f"{OVERRIDE}: {spelled} is not phases.NAME.section.key=value. Example: "
            "phases.simple.training.learning_rate=1e-5. Phases themselves stand in a file."
        )
    layer.phases = layer.phases or {}
    inner = layer.phases.setdefault(phase, Layer(f"{OVERRIDE}: phases.{phase}"))
    set_override(inner, key, value)
    _require_own_run(inner)
