"""Two answers match if they differ only in what the options ignore."""

import pytest

from qwenvl_ft.errors import RecipeError
from qwenvl_ft.evaluation.metrics import exact_match, mean, metric_of, normalise


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
    assert metric_of("exact_match") is exact_match


def test_the_mean_of_nothing_is_zero():
    assert mean([]) == 0.0
    assert mean([1.0, 0.0, 0.0, 0.0]) == 0.25
