"""Every method has a row in the table of docs/tuning.md; some are run here and compared cell by cell."""

import methods_table
import pytest
import torch
from methods_cases import FAMILIES, NOT_RUN
from methods_table import CASES, COLUMNS, GUIDE, as_others, joined, table, tried, written

from qwenvl_ft.errors import RecipeError
from qwenvl_ft.tuning.methods import METHODS
from qwenvl_ft.tuning.optimizer import param_groups

AGAIN = [("init_weights: pissa", "dense"), ("adalora", "dense"), ("lora, router too", "moe")]
"""Rows that every test run checks; `make methods` checks all."""


def documented():
    lines = [line for line in GUIDE.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    start = next(i for i, line in enumerate(lines) if line.startswith("| method | start |"))
    rows = {}
    for line in lines[start + 2 :]:
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) != len(COLUMNS) + len(FAMILIES) + 1:
            break
        rows[cells[0]] = dict(zip([*COLUMNS, *FAMILIES], cells[1:], strict=True))
    return rows


DECAYS = [name for name, case in CASES.items() if METHODS[case.tuner.get("train_type", "full")].adapter]
"""Rows of adapter methods other than LoRA."""


@pytest.mark.parametrize("name", ["lora", "use_dora", *DECAYS])
def test_weight_decay_draws_an_adapter_to_the_base_model(name):
    """Once its decaying weights are close to zero, an adapter no longer changes the model."""
    model = methods_table.prepared(CASES[name], "dense")
    with torch.no_grad():
        for group in param_groups(model, learning_rate=1.0, weight_decay=0.1):
            for value in group["params"] if group["weight_decay"] else []:
                if not any(value is other for other in full_copies(model)):
                    value.mul_(1e-5)
    found, expected = methods_table.logits(model), methods_table.logits(methods_table.fresh("dense"))
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-3)


def full_copies(model):
    return [value for name, value in model.named_parameters() if ".modules_to_save." in name]


def test_a_scale_that_decayed_would_not(monkeypatch):
    monkeypatch.setattr("qwenvl_ft.tuning.optimizer.NO_DECAY_MARKS", ())
    for name in ("use_dora", "boft", "ia3", "road", "psoft", "reft"):
        with pytest.raises(AssertionError, match="not close"):
            test_weight_decay_draws_an_adapter_to_the_base_model(name)


@pytest.mark.soak
@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), AGAIN)
def test_a_method_keeps_what_the_table_says(name, kind):
    row = documented()[name]
    for column, found in tried(name, kind).items():
        dense, _, moe = row[column].partition(" / ")
        expected = {"dense": dense, "moe": moe or dense}[kind]
        assert found == (expected if (kind, column) != ("dense", "experts") else "none"), column


def test_the_table_has_a_row_for_every_method_and_no_other():
    rows = documented()
    assert list(rows) == list(CASES)
    types = {case.tuner["train_type"] if "train_type" in case.tuner else "lora" for case in CASES.values()}
    assert types == set(METHODS)


def test_what_cannot_hold_has_a_reason_and_nothing_else_is_a_no():
    for name, row in documented().items():
        for column, cell in row.items():
            if column in FAMILIES:
                assert cell in ("yes", NOT_RUN) or cell.startswith("no: "), f"{name}: {column}"
            elif column != "experts":
                expected = f"no: {CASES[name].cannot[column]}" if column in CASES[name].cannot else "yes"
                assert cell == expected, f"{name}: {column}"


def test_the_document_explains_every_column():
    text = GUIDE.read_text(encoding="utf-8")
    assert [column for column in COLUMNS if f"- **{column}**: " not in text] == []


def test_cells_of_both_architectures_are_joined():
    same = {"dense": {"isolated": "yes", "experts": "none"}, "moe": {"isolated": "yes", "experts": "trained"}}
    assert (joined(same, "isolated"), joined(same, "experts")) == ("yes", "trained")
    assert joined({"dense": {"isolated": "yes"}, "moe": {"isolated": "no"}}, "isolated") == "yes / no"


def test_a_cell_of_another_family_names_what_differs_and_why_it_was_refused():
    base = dict.fromkeys(COLUMNS, "yes") | {"merges": "no: changes no weight", "experts": "none"}
    both = {"dense": base, "moe": base}
    assert as_others(lambda: base | {"experts": "trained"}, both) == "yes"
    assert as_others(lambda: base | {"learns": "no", "merges": "yes"}, both) == "no: learns, merges"

    def refused():
        raise RecipeError("too narrow")

    assert as_others(refused, both) == "no: too narrow"


def test_the_table_takes_the_place_of_the_last_one():
    document = GUIDE.read_text(encoding="utf-8")
    page = written(document, table(["| a | yes |"]))
    assert "| a | yes |" in page
    assert "| lora |" not in page
    assert written(page, table([])).count("\n") == page.count("\n") - 1
    assert page.split(methods_table.END)[1] == document.split(methods_table.END)[1] != ""


def test_a_weight_that_moves_and_should_not_is_seen():
    model, before = methods_table.trained(CASES["lora"], "dense")
    assert methods_table.check_isolated(model, before)
    stray = next(value for value in model.parameters() if not value.requires_grad)
    stray.data.view(-1)[0] += 1
    assert not methods_table.check_isolated(model, before)
