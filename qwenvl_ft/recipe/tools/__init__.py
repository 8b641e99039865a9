"""Tools whose files and command lines are read: name, as in `dialect_defaults.DIALECTS` -> table of their keys."""

from qwenvl_ft.recipe.foreign import Tool
from qwenvl_ft.recipe.tools.axolotl import AXOLOTL
from qwenvl_ft.recipe.tools.llama_factory import LLAMA_FACTORY
from qwenvl_ft.recipe.tools.two_u_one import TWO_U_ONE

TOOLS: dict[str, Tool] = {"axolotl": AXOLOTL, "LLaMA-Factory": LLAMA_FACTORY, "2U1": TWO_U_ONE}
