"""The rule-based stand-in for GREEN, component by component."""

import json

import pytest

from qwenvl_ft.errors import DataError
from qwenvl_ft.flare.overlap import bleu, rouge
from qwenvl_ft.flare.report_score import WEIGHTS, components, findings, report_generation

REPORT = "Findings: Small left pleural effusion, 3 mm nodule. No pneumothorax. Impression: Unchanged effusion."


def test_findings_are_asserted_or_denied():
    assert findings("No effusion. Small left nodule.") == {"effusion": False, "nodule": True}
    assert findings("No pneumothorax or effusion, but there is a mass.") == {
        "effusion": False,
        "mass": True,
        "pneumothorax": False,
    }
    assert findings("Effusion without pneumothorax") == {"effusion": True, "pneumothorax": False}
    assert findings("No effusion. The effusion is new.") == {"effusion": True}, "asserted anywhere counts"
    assert findings("The heart is enlarged. 3.5 cm mass.") == {"cardiomegaly": True, "mass": True}
    assert findings("The lungs are clear.") == {}


def test_the_weights_sum_to_one():
    assert sum(WEIGHTS.values()) == pytest.approx(1)
    scores = report_generation([REPORT], [REPORT])
    assert scores["green_stand_in"] == pytest.approx(1)
    assert {scores[f"green_stand_in_{name}"] for name in WEIGHTS} == {1.0}


@pytest.mark.parametrize(
    ("old", "new", "component", "score"),
    [
        ("3 mm nodule", "3 mm lesion", "entities", 4 / 5),
        ("left pleural", "right pleural", "locations", 1 / 2),
        ("No pneumothorax", "Pneumothorax", "negation", 2 / 3),
        ("Unchanged", "Known", "temporal", 0.0),
        ("3 mm", "5 mm", "measurements", 0.0),
        ("Small", "Large", "significance", 0.0),
        ("Impression: ", "", "structure", (12 / 13 + 2 / 3) / 2),
    ],
)
def test_each_change_costs_its_own_component(old, new, component, score):
    changed = REPORT.replace(old, new)
    assert changed != REPORT
    scores = components(REPORT, changed)
    assert scores.pop(component) == pytest.approx(score)
    length = scores.pop("structure", 1.0)
    assert 0.9 < length <= 1.0
    assert set(scores.values()) == {1.0}


def test_the_score_is_the_weighted_sum_over_reports():
    scores = report_generation([REPORT, REPORT], [REPORT, REPORT.replace("Unchanged", "Known")])
    assert scores["green_stand_in"] == pytest.approx((1 + 0.9) / 2)
    assert scores["green_stand_in_temporal"] == 0.5


def test_an_empty_answer_scores_nothing():
    scores = report_generation(["The lungs are clear."], [" "])
    assert (scores["green_stand_in"], scores["n_unparsed"]) == (0.0, 1)
    assert report_generation(["The lungs are clear."], ["Clear lungs."])["green_stand_in"] > 0.9


def test_clinical_efficacy_counts_asserted_findings():
    """Reference: effusion, nodule. Answer: effusion, mass. One of two, both ways."""
    scores = report_generation(
        ["Effusion and nodule. No edema.", "Clear."], ["Effusion. A mass. Edema is absent.", "Clear."]
    )
    assert scores["findings_precision"] == pytest.approx(1 / 3), "'absent' behind the finding is not understood"
    assert scores["findings_recall"] == pytest.approx(1 / 2)
    assert scores["findings_f1"] == pytest.approx(2 / 5)


def test_wording_scores_are_those_of_bleu_and_rouge():
    references, answers = [REPORT, "Clear lungs, no effusion."], ["Small effusion.", "Clear lungs, no mass."]
    scores = report_generation(references, answers)
    assert scores["bleu_4"] == bleu(references, answers)
    pairs = [rouge(*pair) for pair in zip(references, answers, strict=True)]
    for name in ("rouge_1", "rouge_2", "rouge_l"):
        assert scores[name] == pytest.approx(sum(pair[name] for pair in pairs) / 2)
    assert json.loads(json.dumps(scores, allow_nan=False)) == scores


def test_unequal_sides_are_an_error():
    with pytest.raises(DataError, match="1 references and 2 answers"):
        report_generation(["a"], ["a", "b"])
