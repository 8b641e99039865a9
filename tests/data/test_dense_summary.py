"""Summaries: the rules that build one from descriptions, and the checks of summaries given by a file."""
# ruff: noqa: RUF001 - Chinese punctuation

import pytest

from qwenvl_ft.data.dense.summary import build_summary, require_summary, split_remark, summary_fault
from qwenvl_ft.errors import DataError


@pytest.mark.parametrize(
    ("descs", "summary"),
    [
        (
            ["switch/vendorA,fully visible", "label/readable", "cable/tied,no sleeve"],
            "switch/vendorA/fully visible×1，label/readable×1，cable/tied/no sleeve×1",
        ),
        (["b/x", "a", "b/x", "a", "b/x"], "b/x×3，a×2"),
        (["a/b,c", "a/b/c", "a / b, c", "a/b，c"], "a/b/c×4"),
        (
            ["label/X7-21,clean", "label/SN 5", "label/unreadable,torn", "label"],
            "label/readable×2，label/unreadable×1，label×1",
        ),
        (["标签/无法识别", "标签/电源线"], "标签/无法识别×1，标签/可识别×1"),
        (["a/b/备注:bent, left", "a/b", "c/备注：dust", "a/b/备注:dust"], "a/b×3，c×1，备注:bent, left；dust"),
        (["备注:nothing else"], "备注:nothing else"),
        (["two\nlines/x"], "two lines/x×1"),
        (["/"], "/×1"),
        ([], ""),
    ],
)
def test_objects_are_counted_in_the_order_of_their_first_appearance(descs, summary):
    assert build_summary({"desc": desc} for desc in descs) == summary
    if summary:
        assert summary_fault(summary) == ""


def test_a_remark_is_what_follows_the_last_slash_and_its_mark():
    assert split_remark("a/b,c/备注:x/y, z") == ("a/b,c", "x/y, z")
    assert split_remark("a/见备注") == ("a/见备注", "")


@pytest.mark.parametrize(
    ("summary", "fault"),
    [
        (None, "there is none"),
        (7, "it is a int, not a text"),
        (" \n", "it is empty"),
        ("a×1\nb×1", "it holds a line break"),
        ("a <|im_end|>", "it holds a special token"),
        ("<image> a", "it holds a special token"),
        ("switch at [75, 150, 350, 450]", "it holds coordinates"),
        ("switch (12.5,7)", "it holds coordinates"),
        ('{"quad": 3}', "it holds coordinates"),
        ("a×1，结论：合格", "it holds a verdict on the group"),
        ("Verdict: pass", "it holds a verdict on the group"),
    ],
)
def test_a_summary_that_is_not_one_line_of_words_is_refused(summary, fault):
    assert summary_fault(summary) == fault
    with pytest.raises(DataError, match=r"a\.jsonl:3: summary="):
        require_summary(summary, "a.jsonl:3")


@pytest.mark.parametrize(
    "summary", ["power line: intact×2", "线缆通过孔×1", "3 of 4 screws (2 new, 1 old)", "line/a×1"]
)
def test_words_that_only_look_like_faults_pass(summary):
    assert require_summary(f" {summary} ", "x") == summary
