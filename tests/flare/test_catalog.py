"""The catalog: 19 data sets, tasks in any spelling, names in any case, data sets of one's own."""

import pytest
from flare_cases import CASES, MORE

from qwenvl_ft.data.sources.registry import DATASETS, find_dataset, parse_selection
from qwenvl_ft.errors import DataError
from qwenvl_ft.flare.catalog import (
    FLARE_DATASETS,
    TASKS,
    FlareDataset,
    find_datasets,
    find_task,
    read_catalog,
    register_converted,
    register_flare_dataset,
    registry_name,
    select,
)

STARTER = ["neojaundice", "retino", "BUSI-det", "boneresorption", "bone_marrow"]


def test_the_catalog_has_all_data_sets_and_categories():
    assert len(FLARE_DATASETS) == 19
    assert len({dataset.category for dataset in FLARE_DATASETS.values()}) == 8
    assert {task for dataset in FLARE_DATASETS.values() for task in dataset.task_types} == set(TASKS)
    assert all(name == dataset.name and dataset.description for name, dataset in FLARE_DATASETS.items())
    assert [case.dataset for case in CASES] == list(FLARE_DATASETS), "the synthetic tree has each of them"


def test_the_starter_set_comes_first_and_in_the_guides_order():
    assert find_datasets(["starter"]) == select(starter=True) == list(FLARE_DATASETS)[:5] == STARTER
    assert find_datasets(["all"]) == list(FLARE_DATASETS)


def test_names_in_recipes_are_lower_case_with_underscores():
    assert [registry_name(name) for name in STARTER] == [
        "flare_neojaundice",
        "flare_retino",
        "flare_busi_det",
        "flare_boneresorption",
        "flare_bone_marrow",
    ]
    assert registry_name("IU_XRay", "val") == "flare_iu_xray_val"
    names = [registry_name(name, split) for name in FLARE_DATASETS for split in ("train", "val", "test")]
    assert len(set(names)) == 57


def test_names_are_found_in_any_case_and_once():
    assert find_datasets(["busi-DET", "flare_busi_det", "retino", "starter"]) == [
        "BUSI-det",
        "retino",
        *STARTER[0:1],
        *STARTER[3:],
    ]


def test_names_may_be_joined_by_commas_but_not_be_missing():
    assert find_datasets(["retino,CMMD", "endo"]) == ["retino", "CMMD", "endo"]
    with pytest.raises(DataError, match="no FLARE data set is named"):
        find_datasets([","])


@pytest.mark.parametrize(("name", "meant"), [("retina", "retino"), ("busi-dett", "BUSI-det"), ("Starters", "starter")])
def test_an_unknown_name_is_an_error_that_suggests_a_similar_one(name, meant):
    with pytest.raises(DataError, match=f"unknown FLARE data set '{name}'. Did you mean '{meant}'"):
        find_datasets([name])


@pytest.mark.parametrize("case", [*CASES, *MORE], ids=lambda case: f"{case.dataset}-{case.spelled}")
def test_the_task_is_found_in_every_spelling(case):
    task, certain = find_task(case.spelled, FLARE_DATASETS[case.dataset])
    assert task == case.task
    assert certain == bool(case.spelled)


@pytest.mark.parametrize("spelled", [None, "", 3, "segmentation of organs", ["detection"]])
def test_an_unknown_task_becomes_the_data_sets_first_and_counts_as_guessed(spelled):
    assert find_task(spelled, FLARE_DATASETS["iugc"]) == ("classification", False)


def test_data_sets_are_selected_by_category_and_task():
    assert select(category="Xray") == ["boneresorption", "dental", "periapical", "IU_XRay", "chestdr"]
    assert select(task="detection", starter=False) == ["BUS-UCLM-det", "iugc"]


def test_a_custom_data_set_is_registered_from_a_file(tmp_path):
    file = tmp_path / "own.yaml"
    file.write_text(
        "path: {category: Microscopy, task_types: [classification]}\n"
        "isic2019: {category: Skin, task_types: [counting], is_starter: true}\n"
    )
    assert read_catalog(file) == ["path", "isic2019"]
    assert find_datasets(["PATH"]) == ["path"]
    assert FLARE_DATASETS["path"] == FlareDataset("path", "Microscopy", "microscopy", ("classification",))
    assert FLARE_DATASETS["isic2019"].modality == "skin"
    assert find_datasets(["starter"])[-1] == "isic2019"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("path: {category: X, task_types: [clasification]}", "Did you mean 'classification'"),
        ("path: {category: X, task_types: []}", "task_types is empty"),
        ("path: {category: X, tasks: [counting]}", "unknown key 'tasks'. Did you mean 'task_types'"),
        ("path: {task_types: [counting]}", "needs category"),
        ("[path]", "must map names"),
        ("path: [", "cannot be read"),
    ],
)
def test_a_malformed_catalog_is_an_error(tmp_path, content, message):
    file = tmp_path / "own.yaml"
    file.write_text(content)
    with pytest.raises(DataError, match=message) as raised:
        read_catalog(file)
    assert "\n" not in str(raised.value)
    assert len(FLARE_DATASETS) == 19


def test_a_missing_catalog_and_an_empty_task_list_are_errors(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        read_catalog(tmp_path / "none.yaml")
    with pytest.raises(DataError, match="task_types is empty"):
        register_flare_dataset(FlareDataset("x", "Y", "z", ()))


def test_converted_files_are_registered_for_recipes(tmp_path):
    for name in ("retino_train", "neojaundice_train", "retino_val", "CMMD_test"):
        (tmp_path / f"{name}.json").write_text("[]")
    (tmp_path / "other_train.json").write_text("[]")
    DATASETS["mine"] = {"annotation_path": "mine.json", "data_path": ""}
    names = register_converted(tmp_path)
    assert names == ["flare_neojaundice", "flare_retino", "flare_retino_val", "flare_cmmd_test"]
    assert [name for name in DATASETS if name.startswith("flare_")] == names[:2], "the guide counts training sets"
    assert [find_dataset(name)["annotation_path"] for name in names[2:]] == [
        str(tmp_path / "retino_val.json"),
        str(tmp_path / "CMMD_test.json"),
    ]
    assert DATASETS["flare_retino"] == {"annotation_path": str(tmp_path / "retino_train.json"), "data_path": ""}
    assert [find_dataset(name)["data_path"] for name, _ in parse_selection("flare_neojaundice%10,flare_retino")] == [
        "",
        "",
    ]


def test_registering_unconverted_data_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"no converted data of any FLARE data set\. Run: qwenvl-ft convert flare"):
        register_converted(tmp_path)
    (tmp_path / "retino_train.json").write_text("[]")
    with pytest.raises(DataError, match=r"no converted data of CMMD\. Run: qwenvl-ft convert flare --datasets CMMD"):
        register_converted(tmp_path, ["retino", "CMMD"])
    assert register_converted(tmp_path, ["retino"]) == ["flare_retino"]
    with pytest.raises(DataError, match="do not find flare_neojaundice"):
        find_dataset("flare_neojaundice")
