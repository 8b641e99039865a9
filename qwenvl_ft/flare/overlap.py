"""Word overlap between a reference and an answer: BLEU-4 and ROUGE.

Both compare lower-case words of letters and digits and ignore punctuation. Scores are from 0 to 1.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence

Words = list[str]


def words(text: str) -> Words:
    """Split into words: ``"No effusion; 3 mm."`` -> ``["no", "effusion", "3", "mm"]``."""
    return re.findall(r"[^\W_]+", text.lower())


def bleu(references: Sequence[str], answers: Sequence[str], order: int = 4) -> float:
    """Return corpus BLEU (Papineni et al. 2002) with one reference each, unsmoothed, over all answers.

    It is the geometric mean of the clipped precisions of 1- to 4-grams, times exp(1 - reference length / answer length)
    if the answers are shorter. Without any common 4-gram it is 0.
    """
    pairs = [(words(reference), words(answer)) for reference, answer in zip(references, answers, strict=True)]
    length, answer_length = (sum(len(side) for side in sides) for sides in zip(*pairs, strict=True))
    logs = 0.0
    for n in range(1, order + 1):
        hits = sum((ngrams(answer, n) & ngrams(reference, n)).total() for reference, answer in pairs)
        if not hits:
            return 0.0
        logs += math.log(hits / sum(ngrams(answer, n).total() for _, answer in pairs)) / order
    return math.exp(logs + min(0.0, 1 - length / answer_length))


def rouge(reference: str, answer: str) -> dict[str, float]:
    """Return the F1 of common words (1), word pairs (2) and longest common subsequence (L) (Lin 2004), unstemmed."""
    a, b = words(reference), words(answer)
    scores = {f"rouge_{n}": _overlap(ngrams(a, n), ngrams(b, n)) for n in (1, 2)}
    return scores | {"rouge_l": _f1(common_subsequence(a, b), len(a) + len(b))}


def ngrams(text: Words, n: int) -> Counter[tuple[str, ...]]:
    """Count each sequence of n words."""
    return Counter(zip(*(text[start:] for start in range(n)), strict=False))


def common_subsequence(a: Words, b: Words) -> int:
    """Return the length of the longest common subsequence, by the bit-parallel algorithm of Hyyrö (2004)."""
    places: dict[str, int] = {}
    for place, word in enumerate(a):
        places[word] = places.get(word, 0) | 1 << place
    every = (1 << len(a)) - 1
    row = every
    for word in b:
        met = row & places.get(word, 0)
        row = ((row + met) | (row - met)) & every
    return len(a) - row.bit_count()


def _overlap(a: Counter[tuple[str, ...]], b: Counter[tuple[str, ...]]) -> float:
    return _f1((a & b).total(), a.total() + b.total())


def _f1(common: int, both: int) -> float:
    return 2 * common / both if both else 0.0
