"""Parses a command line into a recipe: files, ``section.key=value`` and flags of other tools, in any order."""

import re
import types
from collections.abc import Iterator
from typing import Annotated, Any, Union, get_args, get_origin

from qwenvl_ft.errors import RecipeError
from qwenvl_ft.recipe.dialect_defaults import default_layer
from qwenvl_ft.recipe.dialect_marks import dialect_of
from qwenvl_ft.recipe.dialects import ALIASES, FILES, flag_type, flag_values
from qwenvl_ft.recipe.foreign import Tool, file_layers, translated
from qwenvl_ft.recipe.keys import bare_names
from qwenvl_ft.recipe.layers import OVERRIDE, Layer, environment_layer, find_recipe, set_override
from qwenvl_ft.recipe.load import build_recipe
from qwenvl_ft.recipe.schema import TOP_LEVEL, Recipe
from qwenvl_ft.recipe.tools import TOOLS

ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)(\.[^=\s]+)?=")
USAGE = """Train a model as a recipe describes.

usage: qwenvl-ft train recipe=NAME|PATH [section.key=value ...] [--flag value ...]
       accelerate launch -m qwenvl_ft.train (same arguments)

  recipe=NAME           a recipe in recipes/, or a file; also --config PATH. It overrides --base_config PATH.
                        The file may also be one of LLaMA-Factory or axolotl
  section.key=value     override a key, for example training.learning_rate=1e-5
  --flag value          a flag of ms-swift, train_qwen.py, LLaMA-Factory or 2U1, a key without its section, or a field
                        of TrainingArguments. Without a recipe, such a command line has the defaults of that tool

To print the resolved recipe: qwenvl-ft recipe NAME. All keys: docs/reference.md"""


def recipe_from_argv(argv: list[str]) -> Recipe:
    """Build a recipe from command line arguments in any order.

    ``recipe=NAME|PATH`` or ``--config PATH`` names the recipe, and ``--base_config PATH`` a weaker one beneath it. A
    flag takes one word, or all following words if its key is a list. A boolean flag may stand alone. Without a file, a
    command line of another tool gets that tool's defaults.

    Raises:
        RecipeError: a flag or key is unknown, or a value is wrong.
    """
    if "--help" in argv or "-h" in argv:
        print(USAGE)
        raise SystemExit(0)
    files: dict[str, str] = {}
    overrides = Layer(OVERRIDE)
    dialect = None if _names_a_file(argv) else dialect_of(_flags(argv))
    tool = TOOLS.get(dialect or "")
    arguments = list(_arguments(_joined(argv), tool))
    if tool is not None:
        theirs = {name: value for name, value, _ in arguments if tool.knows(name)}
        arguments = [argument for argument in arguments if argument[0] not in theirs]
        for key, converted in translated(tool, str(dialect), theirs, f"{OVERRIDE}, as in {dialect}").items():
            overrides.set(key, converted, key)
    for name, value, spelled in arguments:
        if name in FILES:
            if FILES[name] in files:
                raise RecipeError(
                    f"{spelled}={value}: {files[FILES[name]]!r} is named already. Name one file; it may extend others."
                )
            files[FILES[name]] = value
        elif "." in name or (name in TOP_LEVEL and name not in ALIASES):
            set_override(overrides, name, value)
        else:
            for key, converted in flag_values(name, value, f"{OVERRIDE}: {spelled}").items():
                overrides.set(key, converted, spelled)
    from_files = [
        layer
        for place in ("base", "recipe")
        if place in files
        for layer in file_layers(find_recipe(files[place]), own=place == "recipe")
    ]
    strong = [environment_layer(), overrides]
    defaults = [default_layer(dialect, _flags(argv), strong)] if dialect else []
    return build_recipe([*defaults, *from_files, *strong])


def _flags(argv: list[str]) -> set[str]:
    """Return the names of the flags of a command line."""
    return {word[2:].partition("=")[0].replace("-", "_") for word in argv if word.startswith("--")}


def _names_a_file(argv: list[str]) -> bool:
    """Return True if a command line names a recipe or another tool's file."""
    names = {word.partition("=")[0] for word in argv if "=" in word and not word.startswith("--")}
    return not FILES.keys().isdisjoint(names | _flags(argv))


def _joined(argv: list[str]) -> list[str]:
    """Put lists and mappings together that the shell has split: ``[8,``, ``16,``, ``24]`` is ``[8, 16, 24]``."""
    words: list[str] = []
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        value = word.partition("=")[2] if ASSIGNMENT.match(word.removeprefix("--")) else word
        if value.startswith(("[", "{")) and _open_brackets(value):
            end = next((k for k in range(1, len(rest) + 1) if not _open_brackets(" ".join([value, *rest[:k]]))), 0)
            if end and not any(other.startswith("--") for other in rest[:end]):
                word, rest = " ".join([word, *rest[:end]]), rest[end:]
        words.append(word)
    return words


def _open_brackets(text: str) -> bool:
    return any(text.count(opening) > text.count(closing) for opening, closing in ("[]", "{}"))


def _arguments(words: list[str], tool: Tool | None) -> Iterator[tuple[str, Any, str]]:
    """Yield name, value and spelling of each argument."""
    while words:
        word = words.pop(0)
        name, equals, text = word.removeprefix("--").partition("=")
        if word.startswith("--"):
            name = name if "." in name else name.replace("-", "_")
            yield name, text if equals else _taken(name, words, tool), f"--{name}"
        elif equals:
            yield name, text, name
        else:
            raise RecipeError(
                f"{word!r} is neither section.key=value nor a flag. Example: training.learning_rate=1e-5."
            )


def _taken(flag: str, words: list[str], tool: Tool | None) -> Any:
    """Remove the words that are a flag's value from ``words`` and return them."""
    kinds = {bool, list} if tool is not None and tool.knows(flag) else _members(flag_type(flag))
    taken: list[str] = []
    while words and not _begins(words[0]) and (not taken or list in kinds):
        taken.append(words.pop(0))
    if not taken and bool not in kinds:
        raise RecipeError(f"--{flag} needs a value, as in --{flag} VALUE.")
    return True if not taken else taken if len(taken) > 1 else taken[0]


def _begins(word: str) -> bool:
    """Return True if a word begins a new argument, so that it is not a value."""
    found = ASSIGNMENT.match(word)
    if word.startswith("--") or found is None:
        return word.startswith("--")
    name, inner = found.groups()
    return name in TOP_LEVEL if inner else name in FILES or name in ALIASES or name in bare_names()


def _members(kind: Any) -> set[Any]:
    """Return the plain types in an annotation."""
    if get_origin(kind) is Annotated:
        return _members(get_args(kind)[0])
    if get_origin(kind) in (Union, types.UnionType):
        return {member for inner in get_args(kind) for member in _members(inner)}
    return {get_origin(kind) or kind}
