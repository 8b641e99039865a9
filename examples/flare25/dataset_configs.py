"""Catalog of the 19 FLARE25 data sets. ``python dataset_configs.py`` lists them."""

from qwenvl_ft.flare.catalog import FLARE_DATASETS as FLARE_DATASETS
from qwenvl_ft.flare.convert import listing

if __name__ == "__main__":
    print(listing())
