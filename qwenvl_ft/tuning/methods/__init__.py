"""The training methods, one module each. `qwenvl_ft.recipe.methods.METHODS` lists them and names their functions."""

from qwenvl_ft.recipe.methods import METHODS as METHODS
from qwenvl_ft.recipe.methods import Method as Method
