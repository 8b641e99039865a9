"""Names of data sets, rates in selections, and the errors for unknown names."""

import pytest

from qwenvl_ft.data.sources.registry import DATASETS, data_dict, find_dataset, parse_selection, register_dataset
from qwenvl_ft.errors import DataError


@pytest.fixture(autouse=True)
def clean_registry():
    before = dict(DATASETS)
    DATASETS.clear()
    yield
    DATASETS.clear()
    DATASETS.update(before)


def test_registered_names_keep_their_order_and_form():
    register_dataset("flare_retino", "converted/retino_train.json")
    register_dataset("flare_busi_det", "converted/BUSI-det_train.json", "images")
    assert [name for name in data_dict if name.startswith("flare_")] == ["flare_retino", "flare_busi_det"]
    assert data_dict["flare_retino"] == {"annotation_path": "converted/retino_train.json", "data_path": ""}


def test_rates_are_percent_and_default_to_all():
    assert parse_selection("a%50, b,c%200") == [("a", 0.5), ("b", 1.0), ("c", 2.0)]
    assert parse_selection(["a%12.5", "x/y.jsonl"]) == [("a", 0.125), ("x/y.jsonl", 1.0)]


def test_a_number_of_records_is_distinguished_from_a_rate():
    chosen = parse_selection("a#1000,b%1,x/y.jsonl#3,x/y#3.jsonl")
    assert chosen == [("a", 1000), ("b", 0.01), ("x/y.jsonl", 3), ("x/y#3.jsonl", 1.0)]
    assert [type(amount) for _, amount in chosen] == [int, float, int, float]
    for wrong in ("a#", "a#0", "a#x", "a#-3", "#3"):
        with pytest.raises(DataError, match=r"after # write the number of records"):
            parse_selection(wrong)


@pytest.mark.parametrize("selection", ["a%", "a%x", "a%0", "a%-5", "%50", "a%inf", "a%nan"])
def test_a_wrong_rate_is_an_error(selection):
    with pytest.raises(DataError, match="must be a positive percentage"):
        parse_selection(selection)


def test_nothing_chosen_is_an_error():
    with pytest.raises(DataError, match="no data set is selected"):
        parse_selection(" , ")


def test_the_error_for_an_unknown_name_lists_the_known_ones():
    register_dataset("flare_retino", "x.json")
    with pytest.raises(
        ValueError, match=r"do not find flare_retina\. Did you mean 'flare_retino'\? Known: flare_retino\."
    ):
        find_dataset("flare_retina")
    with pytest.raises(DataError, match=r"do not find nowhere\.jsonl: there is no such file"):
        find_dataset("nowhere.jsonl")


def test_entries_added_to_the_dict_directly_are_checked():
    data_dict["flare_path"] = {"annotation_path": "x.json"}
    assert find_dataset("flare_path") == {"annotation_path": "x.json", "data_path": ""}
    data_dict["flare_path"] = {"anotation_path": "x.json"}
    with pytest.raises(
        DataError, match=r"data set flare_path: unknown key .anotation_path. .* Did you mean 'annotation_path'\?"
    ):
        find_dataset("flare_path")
    data_dict["flare_path"] = {"data_path": "x"}
    with pytest.raises(DataError, match=r"data set flare_path: no annotation_path"):
        find_dataset("flare_path")


def test_names_that_are_not_allowed_in_a_selection_are_refused():
    for name in ("a,b", "a%5", "a#5", "", "a b", "a/b"):
        with pytest.raises(DataError, match="data set name"):
            register_dataset(name, "x.json")
