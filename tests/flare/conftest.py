"""Fixtures of the synthetic FLARE tree; they restore the registries."""

import pytest
from flare_cases import CASES, MORE, Tree

from qwenvl_ft.data.sources.registry import DATASETS, UNLISTED
from qwenvl_ft.flare.catalog import FLARE_DATASETS


@pytest.fixture
def tree(tmp_path):
    """An empty tree."""
    return Tree(tmp_path / "organized_dataset")


@pytest.fixture
def full_tree(tree):
    """All 19 data sets for training, and for validation with answers."""
    tree.fill(CASES + MORE)
    tree.fill(CASES + MORE, "validation-hidden", "val_withGT")
    return tree


@pytest.fixture(autouse=True)
def clean_tables():
    """The catalog and the registry as they were."""
    before = [(table, dict(table)) for table in (FLARE_DATASETS, DATASETS, UNLISTED)]
    yield
    for table, content in before:
        table.clear()
        table.update(content)
