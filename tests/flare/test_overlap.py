"""BLEU and ROUGE by hand and against plain re-implementations of their definitions."""

import math
import random

import pytest

from qwenvl_ft.flare.overlap import bleu, common_subsequence, ngrams, rouge, words


def test_words_are_lower_case_letters_and_digits():
    assert words("No effusion; 3.5 mm_wide (Größe)!") == ["no", "effusion", "3", "5", "mm", "wide", "größe"]


def test_bleu_by_hand():
    """6 words of 7: matches 6/6, 4/5, 2/4, 1/3 of the 1- to 4-grams; brevity exp(1 - 7/6)."""
    reference, answer = "the lungs are clear and well expanded", "the lungs are clear well expanded"
    expected = math.exp(1 - 7 / 6) * (6 / 6 * 4 / 5 * 2 / 4 * 1 / 3) ** 0.25
    assert bleu([reference], [answer]) == pytest.approx(expected)
    assert bleu([reference], [reference]) == 1.0
    assert bleu([reference], ["no no no"]) == bleu([reference], [""]) == 0.0


def test_bleu_clips_repeats():
    assert bleu(["the cat sat"], ["the the the"], order=1) == pytest.approx(1 / 3)


def test_bleu_counts_over_the_corpus_not_by_sentence():
    """A short answer without any 4-gram lowers the score, it does not make a mean with zero."""
    long = "a b c d e f"
    score = bleu([long, "x y"], [long, "x y"])
    assert score == 1.0
    assert 0 < bleu([long, "x y"], [long, "x z"]) < 1


def test_rouge_by_hand():
    """Common words 3 of 4 and 5, pairs (a b) 1 of 3 and 4, subsequence 'a b d' 3."""
    scores = rouge("a b c d", "a b x d d")
    assert scores["rouge_1"] == pytest.approx(2 * 3 / 9)
    assert scores["rouge_2"] == pytest.approx(2 * 1 / 7)
    assert scores["rouge_l"] == pytest.approx(2 * 3 / 9)
    assert rouge("a b c", "c b a")["rouge_l"] == pytest.approx(1 / 3), "order counts"
    assert set(rouge("a", "").values()) == {0.0}


def test_the_longest_common_subsequence_equals_dynamic_programming():
    def table(a, b):
        rows = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
        for i, x in enumerate(a):
            for j, y in enumerate(b):
                rows[i + 1][j + 1] = rows[i][j] + 1 if x == y else max(rows[i][j + 1], rows[i + 1][j])
        return rows[-1][-1]

    draw = random.Random(0)
    seen = set()
    for _ in range(300):
        a, b = (draw.choices("abcde", k=draw.randrange(0, 80)) for _ in range(2))
        seen.add(table(a, b))
        assert common_subsequence(a, b) == table(a, b)
    assert len(seen) > 20


def test_ngrams_are_counted():
    assert ngrams(["a", "b", "a", "b"], 2) == {("a", "b"): 2, ("b", "a"): 1}
    assert not ngrams(["a"], 2)
