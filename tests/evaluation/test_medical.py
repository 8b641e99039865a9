"""Medical metrics against values worked out by hand, and against scikit-learn, SciPy and torchvision."""

import json

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from sklearn import metrics as sklearn_metrics
from sklearn.preprocessing import MultiLabelBinarizer
from torchvision.ops import box_iou as torchvision_iou

from qwenvl_ft.errors import DataError
from qwenvl_ft.evaluation.matching import box_iou, match
from qwenvl_ft.evaluation.medical import (
    classification,
    counting,
    detection,
    instance_detection,
    multi_label,
    regression,
)


def test_classification_by_hand():
    """A: 2 of 3 found, B: 1 of 1, C: 0 of 1. One answer cannot be read, one is a letter that no reference has."""
    scores = classification(["A", "A", "A", "B", "C"], ["A", "The answer is A.", "maybe", "(b)", "K"])
    assert scores["balanced_accuracy"] == pytest.approx((2 / 3 + 1 + 0) / 3)
    assert scores["accuracy"] == pytest.approx(3 / 5)
    assert scores["weighted_f1"] == pytest.approx((3 * (4 / 5) + 1 * 1 + 0) / 5)
    assert scores["recall"] == {"a": pytest.approx(2 / 3), "b": 1.0, "c": 0.0}
    assert (scores["count"], scores["n_unparsed"]) == (5, 1)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_classification_equals_scikit_learn():
    rng = np.random.default_rng(0)
    expected = rng.choice(list("ABCDK"), 300, p=[0.5, 0.3, 0.1, 0.05, 0.05]).tolist()
    answered = [name if rng.random() < 0.6 else str(rng.choice(list("ABCDKZ"))) for name in expected]
    scores = classification(expected, [f"Answer: {name}" for name in answered])
    assert scores["balanced_accuracy"] == pytest.approx(sklearn_metrics.balanced_accuracy_score(expected, answered))
    assert scores["accuracy"] == pytest.approx(sklearn_metrics.accuracy_score(expected, answered))
    f1 = sklearn_metrics.f1_score(expected, answered, average="weighted", zero_division=0)
    assert scores["weighted_f1"] == pytest.approx(f1)
    assert len({round(scores[key], 6) for key in ("balanced_accuracy", "accuracy", "weighted_f1")}) == 3, "vacuous"


def test_class_names_are_matched_as_names():
    """Names, not letters, as in mammography; a letter search would make every one of these 'unreadable'."""
    scores = classification(["Benign", "Malignant", "Luminal b"], ["benign.", "It is malignant", "Benign"])
    assert scores["recall"] == {"benign": 1.0, "luminal b": 0.0, "malignant": 1.0}
    assert scores["n_unparsed"] == 0


def test_multi_label_by_hand():
    """Common 1 of 2+1, 2 of 2+2, 0 of 1+0: sample F1 2/3, 1, 0; micro 2*3 / (5+3)."""
    scores = multi_label(["Edema, Mass", "Edema,Effusion", "Mass"], ["edema", "Effusion, EDEMA", ""])
    assert scores["f1_samples"] == pytest.approx((2 / 3 + 1 + 0) / 3)
    assert scores["f1_micro"] == pytest.approx(6 / 8)
    assert scores["exact_match"] == pytest.approx(1 / 3)
    assert scores["n_unparsed"] == 1


def test_two_empty_label_sets_agree():
    assert multi_label([",", "a"], ["", "a"])["f1_samples"] == 1.0


def test_a_label_with_a_comma_is_known_from_the_other_references():
    references = ["Caries, deep; Root piece", "Caries, deep"]
    scores = multi_label(references, ["Caries, deep; Root piece", "Root piece; Caries, deep"])
    assert scores["f1_samples"] == pytest.approx((1 + 2 / 3) / 2)
    split = multi_label(references[1:], ["Root piece; Caries, deep"])
    assert split["f1_samples"] == 0.0, "vacuous: split at its comma it agrees too"


def test_multi_label_equals_scikit_learn():
    rng = np.random.default_rng(1)
    names = ["edema", "mass", "nodule", "effusion", "hernia"]
    sets = [[[n for n in names if rng.random() < 0.25] for _ in range(200)] for _ in range(2)]
    scores = multi_label(*[["; ".join(labels) for labels in side] for side in sets])
    expected, answered = (MultiLabelBinarizer(classes=names).fit_transform(side) for side in sets)
    assert any(not a and not b for a, b in zip(*sets, strict=True)), "vacuous: no pair of empty sets"
    for average in ("samples", "micro"):
        f1 = sklearn_metrics.f1_score(expected, answered, average=average, zero_division=1)
        assert scores[f"f1_{average}"] == pytest.approx(f1)
    assert scores["exact_match"] == pytest.approx(sklearn_metrics.accuracy_score(expected, answered))


def test_iou_equals_torchvision():
    rng = np.random.default_rng(2)
    boxes, others = (np.sort(rng.uniform(0, 100, (n, 2, 2)), axis=1).reshape(-1, 4) for n in (20, 30))
    expected = torchvision_iou(torch.tensor(boxes), torch.tensor(others)).numpy()
    np.testing.assert_allclose(box_iou(boxes.tolist(), others.tolist()), expected, atol=1e-12)
    assert (expected > 0.1).sum() > 20
    assert box_iou([], [(0, 0, 1, 1)]).shape == (0, 1)
    assert box_iou([(3, 3, 3, 3)], [(3, 3, 3, 3)]).item() == 0.0


def test_detection_by_hand():
    """Image 1: IoU 1 and one box too many. Image 2: IoU of (0,0,10,10) and (0,0,10,4) is 0.4. Image 3: unreadable.
    Image 4: nothing expected, nothing answered. At 0.3: 2 of 3 found, 3 answered; at 0.5: 1 of 3."""
    references = ["[[0, 0, 10, 10]]", "[0, 0, 10, 10]", "[[5, 5, 9, 9]]", "[]"]
    answers = ["[0, 0, 10, 10]; [50, 50, 60, 60]", "[[0, 0, 10, 4]]", "a mass", "[]"]
    scores = detection(references, answers)
    assert scores["f1@0.3"] == pytest.approx(2 * 2 / (3 + 3))
    assert scores["f1@0.4"] == pytest.approx(2 * 1 / (3 + 3)), "the threshold itself is not above"
    assert scores["f1@0.5"] == pytest.approx(1 / 3)
    assert (scores["tp@0.5"], scores["fp@0.5"], scores["fn@0.5"]) == (1, 2, 2)
    assert scores["f1_mean"] == pytest.approx((2 / 3 + 4 * (1 / 3)) / 5)
    assert (scores["count"], scores["n_unparsed"]) == (4, 1)


def test_a_box_is_matched_once():
    scores = detection(["[[0, 0, 10, 10]]"], ["[[0, 0, 10, 10], [0, 0, 10, 10], [0, 0, 10, 9]]"])
    assert (scores["tp@0.5"], scores["fp@0.5"], scores["fn@0.5"]) == (1, 2, 0)


def test_greedy_matching_is_close_to_optimal():
    likeness = np.array([[0.9, 0.8], [0.85, 0.0]])
    assert match(likeness, 0.5) == [(0, 0)]
    assert match(likeness * 0, 0.5) == []
    rng = np.random.default_rng(3)
    ours = best = 0
    for _ in range(200):
        random = rng.uniform(0, 1, (rng.integers(1, 7), rng.integers(1, 7))) ** 2
        pairs = match(random, 0.5)
        rows, columns = linear_sum_assignment(-(random > 0.5).astype(float))
        assert len({row for row, _ in pairs}) == len({column for _, column in pairs}) == len(pairs)
        assert all(random[pair] > 0.5 for pair in pairs)
        optimum = int((random[rows, columns] > 0.5).sum())
        assert len(pairs) <= optimum <= 2 * len(pairs)
        ours, best = ours + len(pairs), best + optimum
    assert 0.9 * best < ours


def test_instances_count_only_for_their_own_id():
    """The two boxes are exchanged: as plain detection both are found, as instances none."""
    reference = json.dumps({"1": [[0, 0, 10, 10]], "X": [[50, 50, 90, 90]]})
    exchanged = json.dumps({"X": [[0, 0, 10, 10]], "1": [[50, 50, 90, 90]]})
    assert detection([reference], [exchanged])["f1@0.5"] == 1.0
    scores = instance_detection([reference], [exchanged])
    assert scores["f1@0.5"] == scores["f1@0.3"] == 0.0
    assert scores["f1_by_id"] == {"1": 0.0, "x": 0.0}
    same = instance_detection([reference], [reference])
    assert same["f1@0.5"] == same["f1_mean"] == same["f1_by_id"]["x"] == 1.0
    half = instance_detection([reference, reference], ['{"1": [[0, 0, 10, 4]]}', "many"])
    assert half["f1_by_id"] == {"1": pytest.approx(2 / 3), "x": 0.0}
    assert (half["f1@0.3"], half["f1@0.5"], half["n_unparsed"]) == (pytest.approx(2 / 5), 0.0, 1)


def test_counting_by_hand():
    """Off by 0, 1, 5 (of 100) and 30 as the last cannot be read."""
    scores = counting(["20", "20", "100", "30"], ["20 cells", "21", "About 105.", "a lot"])
    assert scores["mae"] == pytest.approx((0 + 1 + 5 + 30) / 4)
    assert scores["mae_parsed"] == pytest.approx((0 + 1 + 5) / 3)
    assert scores["rmse"] == pytest.approx(((0 + 1 + 25 + 900) / 4) ** 0.5)
    assert (scores["exact"], scores["within_1"], scores["within_5_percent"]) == (0.25, 0.5, 0.75)
    assert scores["n_unparsed"] == 1


def test_an_unreadable_count_is_never_right():
    scores = counting(["0", "0"], ["none", "0"])
    assert scores["exact"] == scores["within_1"] == scores["within_5_percent"] == 0.5
    assert scores["mae"] == 0.0
    assert scores["n_unparsed"] == 1
    assert counting(["3"], ["?"])["mae_parsed"] is None


def test_regression_equals_scikit_learn():
    rng = np.random.default_rng(4)
    expected = rng.uniform(0, 60, 100).round(2)
    answered = (expected + rng.normal(0, 5, 100)).round(2)
    scores = regression([f"{value}" for value in expected], [f"{value} %" for value in answered])
    assert scores["mae"] == pytest.approx(sklearn_metrics.mean_absolute_error(expected, answered))
    assert scores["rmse"] == pytest.approx(sklearn_metrics.root_mean_squared_error(expected, answered))
    assert scores["r2"] == pytest.approx(sklearn_metrics.r2_score(expected, answered))
    assert 0.5 < scores["r2"] < 0.99
    for values in (["5", "5"], ["5", "6"]):
        ours = regression(["5", "5"], values)["r2"]
        assert ours == sklearn_metrics.r2_score([5, 5], [float(value) for value in values])


@pytest.mark.parametrize("metric", [classification, multi_label, detection, instance_detection, counting, regression])
def test_unequal_or_no_references_are_an_error(metric):
    with pytest.raises(DataError, match="2 references and 1 answers"):
        metric(["1", "2"], ["1"])
    with pytest.raises(DataError, match="0 references"):
        metric([], [])


@pytest.mark.parametrize("metric", [detection, instance_detection, counting, regression])
def test_a_reference_that_cannot_be_read_is_an_error(metric):
    with pytest.raises(DataError, match="reference 'see report' cannot be read"):
        metric(["see report"], ["1"])


@pytest.mark.parametrize("metric", [classification, multi_label, detection, instance_detection, counting, regression])
def test_results_are_plain_json(metric):
    reference = "[[1, 2, 3, 4]]" if metric in (detection, instance_detection) else "3"
    assert json.loads(json.dumps(metric([reference], [reference]), allow_nan=False))["count"] == 1
