"""Two answers match if they differ only in what the options ignore."""

import pytest

from qwenvl_ft.errors import RecipeError
from qwenvl_ft.evaluation.metrics import METRICS, exact_match, figures, mean, metric_of, normalise, one_line
from qwenvl_ft.flare.score import TASK_METRICS

RIGHT = {
    "exact_match": "a cat",
    "geometry": '[{"label": "cat", "bbox_2d": [0, 0, 5, 9]}]',
    "classification": "benign",
    "multi_label": "edema; effusion",
    "detection": "[[0, 0, 5, 9]]",
    "instance_detection": '{"1": [[0, 0, 5, 9]]}',
    "counting": "12",
    "regression": "3.5",
    "report_generation": "There is a small left effusion. No pneumothorax.",
}
"""Metric -> a text that is a right answer to itself."""


@pytest.mark.parametrize(
    ("answer", "expected", "options", "score"),
    [
        ("7", "7", {}, 1.0),
        (" 7\n", "7", {}, 1.0),
        (" 7\n", "7", {"strip": False}, 0.0),
        ("7", "1", {}, 0.0),
        ("", "", {}, 1.0),
        ("Yes", "yes", {}, 0.0),
        ("STRASSE", "straße", {"ignore_case": True}, 1.0),
        ("7.", "7", {}, 0.0),
        ("7 .", "7", {"ignore_punctuation": True}, 1.0),
        ("e\u0301", "\u00e9", {}, 1.0),
        ("a b", "ab", {"ignore_case": True, "ignore_punctuation": True}, 0.0),
    ],
)
def test_exact_match_ignores_what_its_options_name(answer, expected, options, score):
    assert exact_match(answer, expected, **options) == score


def test_normalising_twice_changes_nothing_more():
    text = " Stra\u00dfe, e\u0301! "
    once = normalise(text, ignore_case=True, ignore_punctuation=True)
    assert normalise(once, ignore_case=True, ignore_punctuation=True) == once == "strasse \u00e9"


def test_an_unknown_metric_is_an_error_that_names_the_known_ones():
    with pytest.raises(RecipeError, match=r"evaluation.metric 'exact_mach'. Did you mean 'exact_match'"):
        metric_of("exact_mach")
    assert metric_of("exact_match") is METRICS["exact_match"]


def test_the_mean_of_nothing_is_zero():
    assert mean([]) == 0.0
    assert mean([1.0, 0.0, 0.0, 0.0]) == 0.25


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_calls_a_right_answer_perfect_and_a_wrong_one_not(name):
    metric, right = METRICS[name], RIGHT[name]
    assert metric.is_perfect(metric.score([right], [right]))
    wrong = metric.score([right], ["nothing 7 of it"])
    assert not metric.is_perfect(wrong)
    best = metric.score([right], [right])[metric.primary]
    assert (best > wrong[metric.primary]) is metric.higher_is_better, "the direction is that of the numbers"
    assert name.replace("_", " ") in one_line(name, wrong)


def test_the_tasks_of_flare_are_scored_by_metrics_of_the_table():
    assert set(map(id, TASK_METRICS.values())) <= set(map(id, METRICS.values()))
    assert len(TASK_METRICS) == 7


def test_options_are_those_of_the_function_and_are_checked():
    assert METRICS["geometry"].options() == {"scale": 1000.0, "iou": 0.5, "distance": 0.02, "by_class": True}
    assert METRICS["counting"].options() == {}
    exact = METRICS["exact_match"]
    assert exact.checked({"ignore_case": "true"}, "--option") == {"ignore_case": True}
    assert exact.score(["Yes"], ["yes"], ignore_case=True)["exact_match"] == 1.0
    with pytest.raises(RecipeError, match=r"--option: 'ignore_cases' is no option of this metric. Did you mean 'ign"):
        exact.checked({"ignore_cases": "true"}, "--option")
    with pytest.raises(RecipeError, match=r"evaluation.metric_options.iou"):
        METRICS["geometry"].checked({"iou": "half"}, "evaluation.metric_options")


def test_figures_are_flat_numbers_named_after_the_metric():
    scores = {"bbox": {"f1": 0.5, "tp": 1}, "line": {"f1": None, "tp": 0}, "f1": 0.5, "count": 2, "n_unparsed": 0}
    expected = {"geometry": 0.5, "geometry_bbox_f1": 0.5, "geometry_bbox_tp": 1, "geometry_line_tp": 0}
    assert figures("geometry", scores) == expected | {"geometry_count": 2, "geometry_n_unparsed": 0}
    assert one_line("geometry", scores) == "geometry 50.00% of 2 (bbox 50.00%, line none)"
