"""docs/reference.md: every key, with its type, default and help, and every other name, from the tables themselves.

python -m qwenvl_ft.recipe.reference > docs/reference.md
"""

import ast
import inspect
import sys
import types
from collections.abc import Sequence
from dataclasses import MISSING, fields
from enum import Enum
from importlib.metadata import version
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from qwenvl_ft.recipe.dialects import ALIASES, ENVIRONMENT, UPSTREAM
from qwenvl_ft.recipe.keys import argument_types, own_types
from qwenvl_ft.recipe.schema import HF_DEFAULTS, SECTIONS

OPENING = """# All keys of a recipe

Written by `python -m qwenvl_ft.recipe.reference` from the schema; do not edit.

A recipe is a YAML file with the sections below. Above them may stand:

- `extends`: a file or a list of files to build on, relative to this file. A later one outweighs an earlier one, and
  this file outweighs all. `inherit` is the same.
- `global_max_length`: tokens of the longest conversation. It sets `model.max_model_len` and `template.max_length`, and
  outweighs both.
- `phases`: a list of runs one after the other, each with a `name` and the keys that it has otherwise: see
  [Phases](training.md#phases).

Mappings are merged key by key. `${section.key}` takes another key's value, `${oc.env:NAME}` an environment variable.
On the command line, `section.key=value` overrides; `--key value` does too, by the key's bare name (not for the sections
`deepspeed` and `evaluation`) or any other name below. `null` unsets what may be unset. `custom` is `data`.
"""

LIMIT_WORDS = {">0": "above 0", ">=0": "from 0", "0..1": "from 0 to below 1"} | {
    "0 to 1": "from 0 to 1",
    "between 0 and 1": "above 0, below 1",
    "steps or -1": "above 0, or -1",
    "count or -1": "above 0, or -1",
    "share or steps": "(steps, or a share of them below 1)",
    "some steps": "above 0 (steps, or a share of them below 1)",
}


def reference() -> str:
    """The document."""
    parts = [OPENING, *(_section(name) for name in SECTIONS), _changed(), _names(), _arguments()]
    return "\n".join(parts)


def helps(section: type) -> dict[str, str]:
    """The text under each field of a dataclass."""
    (body,) = ast.parse(inspect.getsource(section)).body
    assert isinstance(body, ast.ClassDef)
    told: dict[str, str] = {}
    for entry, after in zip(body.body, body.body[1:], strict=False):
        if isinstance(entry, ast.AnnAssign) and isinstance(entry.target, ast.Name) and isinstance(after, ast.Expr):
            told[entry.target.id] = " ".join(str(ast.literal_eval(after.value)).split())
    return told


def type_name(annotation: Any) -> str:
    """An annotation as a reader would say it: ``int above 0 or null``."""
    origin = get_origin(annotation)
    if origin is Annotated:
        base, limit = get_args(annotation)[:2]
        return f"{type_name(base)} {LIMIT_WORDS[limit]}"
    if origin in (Union, types.UnionType):
        members = get_args(annotation)
        enums = [member for member in members if isinstance(member, type) and issubclass(member, Enum)]
        named = [member for member in enums or members if member is not type(None)]
        return " or ".join([*map(type_name, named), *(["null"] if type(None) in members else [])])
    if origin is Literal:
        return ", ".join(str(choice) for choice in get_args(annotation))
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return ", ".join(str(member.value) for member in annotation)
    if origin in (list, dict):
        word = {list: "list", dict: "mapping"}[origin]
        inner = get_args(annotation)[-1]
        if get_origin(inner) is Literal:
            return f"{word} of these"
        return word if inner is Any or origin is dict else f"{word} of {type_name(inner)}"
    return {str: "text", bool: "true, false", dict: "mapping"}.get(annotation, getattr(annotation, "__name__", "any"))


def _section(name: str) -> str:
    section = SECTIONS[name]
    told, types_ = helps(section), own_types(name)
    rows = [
        (f"`{entry.name}`", type_name(types_[entry.name]), _shown(entry), told[entry.name])
        for entry in fields(section)
        if entry.name in types_
    ]
    return f"\n## {name}\n\n{section.__doc__}\n\n" + _table(("key", "type", "default", "meaning"), rows)


def _shown(entry: Any) -> str:
    value = entry.default if entry.default is not MISSING else entry.default_factory()
    return f"`{_yaml(value)}`"


def _yaml(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return f"[{', '.join(map(_yaml, value))}]"
    return '""' if value == "" else str(value)


def _changed() -> str:
    rows = [(f"`training.{name}`", f"`{_yaml(value)}`") for name, value in HF_DEFAULTS.items()]
    return (
        "\n## Our defaults for fields of TrainingArguments\n\nThe fields that a run mostly sets; the others have "
        "transformers' own.\n\n" + _table(("key", "default"), rows)
    )


def _names() -> str:
    rows = [(f"`{name}`", ", ".join(f"`{key}`" for key in alias.keys), alias.told) for name, alias in ALIASES.items()]
    upstream = [
        (f"`--{flag}`", ", ".join(f"`{key}: {_yaml(value)}`" for key, value in defaults.items()))
        for flag, defaults in UPSTREAM.items()
    ]
    return (
        "\n## Other names\n\nFlags of ms-swift and of qwen-vl-finetune's `train_qwen.py`, and older spellings. They "
        "also work in a file, in the\nsection of the key that they stand for.\n\n"
        + _table(("name", "our key", "value"), rows)
        + "\nSome are of qwen-vl-finetune alone. A command line with one of them means its defaults, where neither a "
        "flag nor a\nrecipe says otherwise:\n\n"
        + _table(("flag", "defaults"), upstream)
        + "\nEnvironment variables of "
        "ms-swift and qwen-vl-utils outweigh files and yield to the command line:\n\n"
        + _table(
            ("variable", "name"),
            [(f"`{key}`", f"`{name if '.' in name else f'template.{name}'}`") for key, name in ENVIRONMENT.items()],
        )
    )


def _arguments() -> str:
    own = own_types("training")
    rows = [(f"`{name}`", type_name(kind)) for name, kind in argument_types().items() if name not in own]
    return (
        f"\n## Fields of TrainingArguments\n\nAll of them stand under `training`; these are those of transformers "
        f"{version('transformers')}, which documents them.\n\n" + _table(("key", "type"), rows)
    )


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


if __name__ == "__main__":
    sys.stdout.write(reference())
