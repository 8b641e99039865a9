"""Trains recipes one after the other in this process; each argument is the JSON list of a recipe's settings."""

import json
import sys

import torch

from qwenvl_ft import train
from qwenvl_ft.recipe.load import load_recipe


def main():
    torch.set_num_threads(1)
    for settings in sys.argv[1:]:
        train(load_recipe(None, json.loads(settings)))


if __name__ == "__main__":
    main()
