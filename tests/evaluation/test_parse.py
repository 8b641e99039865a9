"""Answers in all the forms that models and annotators write them."""

import pytest

from qwenvl_ft.evaluation.parse import (
    close_json,
    load_json,
    map_boxes,
    parse_boxes,
    parse_class,
    parse_instances,
    parse_labels,
    parse_letter,
    parse_number,
)


@pytest.mark.parametrize(
    "text",
    [
        "B",
        "b",
        "(b)",
        "B.",
        "B. Benign",
        "B) or benign",
        "**B**",
        "B: benign",
        "The answer is B.",
        "Answer: B",
        "B Benign",
    ]
    + ["\\boxed{B}", "I think it is B", "Option (B)", "```\nB\n```", "<think>A? C?</think>\n\nB", "B<|im_end|>"]
    + ["Answer: A\nNo. The final answer is: **B**", "B\nBecause vitamin D is low.", "B. Vitamin D deficiency"],
)
def test_a_letter_is_found_in_every_form(text):
    assert parse_letter(text) == "B"


@pytest.mark.parametrize(
    "text", ["", "benign", "A benign lesion", "B or C", "B, C", "I see nothing", "either B, or D", "12"]
)
def test_an_answer_without_a_single_letter_is_none(text):
    assert parse_letter(text) is None


def test_letters_go_beyond_e():
    assert [parse_letter(f"The answer is {letter}.") for letter in "AFKZ"] == list("AFKZ")


CLASSES = {"benign", "malignant", "both", "luminal b", "b"}


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Benign", "benign"),
        (" MALIGNANT. ", "malignant"),
        ("It looks benign to me.", "benign"),
        ("Subtype: Luminal B", "luminal b"),
        ("benign or malignant", None),
        ("non-malignant", None),
        ("bothersome", None),
        ("", None),
    ],
)
def test_a_class_is_found_as_a_whole_word_and_the_longest_counts(text, name):
    assert parse_class(text, CLASSES) == name


def test_labels_are_split_at_semicolons_first():
    assert parse_labels("Caries, deep; Root piece") == {"caries, deep", "root piece"}
    assert parse_labels("Edema, Effusion ,Mass") == {"edema", "effusion", "mass"}
    assert parse_labels("Pleural Effusion") == {"pleural effusion"}, "white space does not split"
    assert parse_labels("Caries, deep") == {"caries", "deep"}
    assert parse_labels("Caries, Deep", known=["caries, deep"]) == {"caries, deep"}
    assert parse_labels('["Edema", "Mass"]') == parse_labels("- Edema\n- Mass") == {"edema", "mass"}
    assert parse_labels(" ") == parse_labels(";") == frozenset()


@pytest.mark.parametrize(
    ("text", "number"),
    [("25", 25), ("25 cells", 25), ("22.9%", 22.9), ("about 1,250 cells", 1250), ("-3.5 mm", -3.5), ("1e2", 100)]
    + [("0", 0), (".5", 0.5), ("20-25", 20), ("T2 shows 7", 7), ("The count is 12.", 12), ("3, 4", 3)]
    + [("", None), ("many", None), ("9" * 400, None), ("1e999", None)],
)
def test_the_first_number_counts(text, number):
    assert parse_number(text) == number


TWO = [(1, 2, 30, 40), (5, 6, 70, 80)]


@pytest.mark.parametrize(
    "text",
    [
        "[[1, 2, 30, 40], [5, 6, 70, 80]]",
        "[[1,2,30,40],[5,6,70,80]]",
        "[1, 2, 30, 40]; [5, 6, 70, 80]",
        "[1, 2, 30, 40]\n[5, 6, 70, 80]",
        "[1 2 30 40] and [5 6 70 80]",
        "1, 2, 30, 40\n5, 6, 70, 80",
        '{"1": [[1, 2, 30, 40]], "2": [5, 6, 70, 80]}',
        '{"boxes": [[1, 2, 30, 40], [5, 6, 70, 80]]}',
        '[{"bbox_2d": [1, 2, 30, 40], "label": "mass"}, {"bbox_2d": [5, 6, 70, 80], "label": "mass"}]',
        '[{"x1": 1, "y1": 2, "x2": 30, "y2": 40}, {"xmin": 5, "ymin": 6, "xmax": 70, "ymax": 80}]',
        "```json\n[[1, 2, 30, 40], [5, 6, 70, 80]]\n```",
        "The lesions are at [[1.0, 2.0, 30.0, 40.0], [5, 6, 70, 80]], both benign (2 of 2).",
        "(1, 2), (30, 40); (5, 6), (70, 80)",
        "<|box_start|>(1,2),(30,40)<|box_end|><|box_start|>(5,6),(70,80)<|box_end|>",
        "[[[1, 2], [30, 40]], [[5, 6], [70, 80]]]",
        "{'1': [(1, 2, 30, 40)], '2': [(5, 6, 70, 80)]}",
        "[[1, 2, 30, 40], [5, 6, 70, 80], [9, 9",
        "[[30, 40, 1, 2], [70, 80, 5, 6]]",
        '{"boxes": ["[1, 2, 30, 40]", "[5, 6, 70, 80]"]}',
    ],
)
def test_boxes_are_read_from_every_form(text):
    assert parse_boxes(text) == TWO


@pytest.mark.parametrize("text", ["[]", "[[]]", "{}", "None", "no", "No lesion is visible.", "```json\n[]\n```"])
def test_no_boxes_is_an_answer(text):
    assert parse_boxes(text) == []


@pytest.mark.parametrize(
    "text", ["", "A lesion on the left.", "[1, 2, 3]", "[[1, 2, 3, 1e999]]", "5", '"x"', "[true, null]"]
)
def test_an_answer_without_boxes_is_none(text):
    assert parse_boxes(text) is None


def test_instances_keep_their_ids():
    expected = {"1": TWO, "x": [(0, 0, 9, 9)]}
    for text in (
        '{"1": [[1, 2, 30, 40], [5, 6, 70, 80]], "X": [[0, 0, 9, 9]]}',
        "{'1': [[1, 2, 30, 40], [5, 6, 70, 80]], 'X': [0, 0, 9, 9]}",
        'Here:\n```json\n{"1": [[1, 2, 30, 40], [5, 6, 70, 80]], "X": [[0, 0, 9, 9]]}\n```\nDone: 3 boxes.',
        "1: [[1, 2, 30, 40], [5, 6, 70, 80]]\nX: [0, 0, 9, 9]",
        "Chromosome 1: [1, 2, 30, 40]; [5, 6, 70, 80]\nchromosome X: [0, 0, 9, 9]",
        '[{"label": "1", "bbox_2d": [1, 2, 30, 40]}, {"bbox_2d": [5, 6, 70, 80], "id": 1},'
        ' {"label": "X", "bbox": [0, 0, 9, 9]}]',
        '{"1": [[1, 2, 30, 40], [5, 6, 70, 80]], "X": [[0, 0, 9, 9], [4, 4',
        '{"1": {"boxes": [[1, 2, 30, 40], [5, 6, 70, 80]]}, "X": {"boxes": [[0, 0, 9, 9]]}, "2": null}',
    ):
        assert parse_instances(text) == expected, text
    assert parse_instances("[[1, 2, 30, 40]]") == {"": TWO[:1]}


def test_numbers_of_boxes_are_replaced_and_the_format_stays():
    text = '{"1": [[0, 50, 100, 200]], "X": [[10.5, 0, 20, 40]]}'
    halved = map_boxes(text, lambda box: [value / 2 for value in box])
    assert halved == '{"1": [[0, 25, 50, 100]], "X": [[5.25, 0, 10, 20]]}'
    assert map_boxes(halved, lambda box: [value * 2 for value in box]) == text


def test_truncated_json_is_closed():
    assert close_json('{"a": [[1, 2], [3') == '{"a": [[1, 2]]}'
    assert load_json('x {"a": {"b": [1], "c": "}]"}, "d": {"e": [2') == {"a": {"b": [1], "c": "}]"}}
    assert load_json("nothing here") is None


def test_hostile_answers_end_quickly():
    for text in ("[" * 5000, "{'a':" * 3000, "a " * 20000, "1," * 20000, "[1, 2, 3, " * 3000):
        assert not parse_boxes(text)
        assert parse_letter(text) is None
        parse_number(text)
        parse_labels(text)
