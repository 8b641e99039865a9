"""Scores generated chest x-ray reports by word overlap and by a rule-based stand-in for GREEN.

GREEN itself is the judgement of a language model (StanfordAIMI/GREEN-radllama2-7b, package ``green_score``). The
stand-in here only compares words of fixed lists: use it to monitor a run, and never report it as GREEN.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from qwenvl_ft.evaluation.matching import require_pairs
from qwenvl_ft.flare.overlap import bleu, rouge, words

FINDINGS: dict[str, str] = {
    "atelectasis": r"atelecta\w+",
    "cardiomegaly": r"cardiomegaly|enlarged (?:heart|cardiac)\w*|(?:heart|cardiac silhouette) (?:is )?enlarged",
    "consolidation": r"consolidat\w+|airspace (?:disease|opacit\w+)",
    "edema": r"o?edema|vascular congestion",
    "effusion": r"effusions?",
    "emphysema": r"emphysema\w*|hyperinflat\w+|copd",
    "fibrosis": r"fibro\w+|scar(?:ring|s)?",
    "fracture": r"fractur\w+",
    "granuloma": r"granuloma\w*|calcifi\w+",
    "hernia": r"hernias?",
    "infiltrate": r"infiltrat\w+",
    "mass": r"mass(?:es)?",
    "nodule": r"nodul\w+",
    "opacity": r"opacit\w+|opacificat\w+",
    "pneumonia": r"pneumonia\w*",
    "pneumothorax": r"pneumothora\w+",
    "thickening": r"thicken\w+",
    "degenerative change": r"degenerat\w+|spondyl\w+|osteophyt\w+",
    "device": r"catheters?|tubes?|pacemakers?|sternotomy|clips?|leads?|lines?",
}
"""Finding -> regex of its wordings in reports."""

LOCATIONS = frozenset(
    words(
        "left right bilateral upper middle lower lobe apex apical base basilar bibasilar basal hilar perihilar "
        "mediastinum mediastinal pleural costophrenic retrocardiac lingula aorta thoracic spine rib ribs diaphragm"
    )
)
TIMES = frozenset(
    words("new old unchanged stable chronic acute subacute increased decreased improved worsened resolved prior")
)
DEGREES = frozenset(
    words("mild mildly minimal small moderate moderately large severe severely marked trace extensive focal")
)
MEASURE = re.compile(r"\d+(?:\.\d+)?\s*(?:mm|cm|m|%|percent)(?![a-z])")
DENIALS = re.compile(r"\b(?:no|not|without|absent|negative|free of|clear of|denies|resolved|unremarkable for)\b")
TURNS = re.compile(r"\b(?:but|however|although|except|otherwise)\b|[,;](?= (?:there|a|an|the)\b)")
"""Words that end a denial within a sentence."""
SECTIONS = ("findings", "impression", "comparison", "indication")

WEIGHTS = {
    "entities": 0.30,
    "locations": 0.20,
    "negation": 0.15,
    "temporal": 0.10,
    "measurements": 0.10,
    "significance": 0.10,
    "structure": 0.05,
}
"""Component of the stand-in -> its share of the score."""


def report_generation(references: Sequence[str], answers: Sequence[str]) -> dict[str, Any]:
    """Return means over reports (``green_stand_in``, its components, ROUGE), and BLEU-4 and findings over all reports.

    Returns:
        Scores by name. ``findings_f1``, ``_precision`` and ``_recall`` concern the findings that a report asserts
        (clinical efficacy); ``n_unparsed`` counts empty answers.

    Raises:
        DataError: there are no references, or their number differs from that of the answers.
    """
    require_pairs(references, answers)
    pairs = list(zip(references, answers, strict=True))
    parts = [components(*pair) for pair in pairs]
    scores: dict[str, Any] = {"green_stand_in": _mean(_weighted(part) for part in parts)}
    scores |= {f"green_stand_in_{name}": _mean(part[name] for part in parts) for name in WEIGHTS}
    scores["bleu_4"] = bleu(references, answers)
    overlaps = [rouge(*pair) for pair in pairs]
    scores |= {name: _mean(overlap[name] for overlap in overlaps) for name in overlaps[0]}
    scores |= _efficacy(pairs)
    return scores | {"count": len(pairs), "n_unparsed": sum(not answer.strip() for answer in answers)}


def components(reference: str, answer: str) -> dict[str, float]:
    """Return the components of the stand-in, 0 to 1; all are 0 for an empty answer."""
    if not words(answer):
        return dict.fromkeys(WEIGHTS, 0.0)
    a, b = findings(reference), findings(answer)
    shared = a.keys() & b.keys()
    return {
        "entities": set_f1(a, b),
        "locations": set_f1(_listed(reference, LOCATIONS), _listed(answer, LOCATIONS)),
        "negation": _mean(float(a[name] == b[name]) for name in shared) if shared else float(not a and not b),
        "temporal": set_f1(_listed(reference, TIMES), _listed(answer, TIMES)),
        "measurements": set_f1(_measures(reference), _measures(answer)),
        "significance": set_f1(_listed(reference, DEGREES), _listed(answer, DEGREES)),
        "structure": _structure(reference, answer),
    }


def findings(report: str) -> dict[str, bool]:
    """Return finding -> True if it is asserted anywhere, False if it is only denied.

    Example:
        ``"No effusion. Small left nodule."`` is ``{"effusion": False, "nodule": True}``.
    """
    asserted: dict[str, bool] = {}
    for sentence in re.split(r"[.\n!?](?!\d)", report.lower()):
        for clause in TURNS.split(sentence):
            denial = DENIALS.search(clause)
            for name, pattern in FINDINGS.items():
                for found in re.finditer(rf"\b(?:{pattern})\b", clause):
                    denied = denial is not None and denial.start() < found.start()
                    asserted[name] = (name in asserted and asserted[name]) or not denied
    return asserted


def set_f1(a: Iterable[str], b: Iterable[str]) -> float:
    """Return the F1 of two sets; 1.0 if both are empty."""
    left, right = set(a), set(b)
    both = len(left) + len(right)
    return 2 * len(left & right) / both if both else 1.0


def _efficacy(pairs: Sequence[tuple[str, str]]) -> dict[str, float]:
    """Return precision, recall and F1 of asserted findings, counted over all reports."""
    sides = [[{name for name, asserted in findings(text).items() if asserted} for text in pair] for pair in pairs]
    hits = sum(len(expected & found) for expected, found in sides)
    wanted, reported = sum(len(expected) for expected, _ in sides), sum(len(found) for _, found in sides)
    return {
        "findings_precision": hits / reported if reported else float(not wanted),
        "findings_recall": hits / wanted if wanted else 1.0,
        "findings_f1": 2 * hits / (wanted + reported) if wanted + reported else 1.0,
    }


def _weighted(part: dict[str, float]) -> float:
    return sum(WEIGHTS[name] * part[name] for name in WEIGHTS)


def _listed(report: str, names: frozenset[str]) -> frozenset[str]:
    return names.intersection(words(report))


def _measures(report: str) -> set[str]:
    return {re.sub(r"\s+", "", found) for found in MEASURE.findall(report.lower())}


def _structure(reference: str, answer: str) -> float:
    """Return the similarity of two reports in length and in section headings, half each."""
    lengths = sorted((len(words(reference)), len(words(answer))))
    sections = [
        {name for name in SECTIONS if re.search(rf"\b{name}\s*:", text.lower())} for text in (reference, answer)
    ]
    return (lengths[0] / lengths[1] + set_f1(*sections)) / 2


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return sum(numbers) / len(numbers)
