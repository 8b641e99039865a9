"""Choices of a key that a table elsewhere defines, found by ``module:NAME`` so that a recipe imports nothing heavy."""

from dataclasses import dataclass
from importlib import import_module
from typing import Any


@dataclass(frozen=True)
class OneOf:
    """Second argument of ``Annotated[str, OneOf("module:TABLE")]``: the value is one of the names in a table.

    The table is imported when a recipe that has the key is read. A module named here must not import torch.
    """

    table: str

    def names(self) -> list[str]:
        """Return the names in the table, in its order."""
        return list(imported(self.table))


def imported(path: str) -> Any:
    """Return the object at ``module:NAME``."""
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)
