"""A pass over all records shows its progress and leaves the results unchanged."""

import pytest
from rich.console import Console

from qwenvl_ft.data.plan import progress_bar as progress
from qwenvl_ft.data.plan.progress_bar import with_progress

CHUNKS = [[1, 2], [3, 4], [5]]


def test_a_log_gets_a_line_at_intervals_and_none_for_a_quick_pass(capsys):
    assert list(with_progress(CHUNKS, 5, "counting")) == CHUNKS
    assert capsys.readouterr().err == ""
    assert list(with_progress(CHUNKS, 5, "counting", line_seconds=0)) == CHUNKS
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines] == ["counting: 2 of 5", "counting: 4 of 5"]
    assert list(with_progress(CHUNKS, 5, "counting", quiet=True, line_seconds=0)) == CHUNKS
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar(capsys, monkeypatch):
    monkeypatch.setattr(progress, "Console", lambda **options: Console(**options, force_terminal=True))
    assert list(with_progress(CHUNKS, 5, "counting")) == CHUNKS
    assert "counting" in capsys.readouterr().err


def test_an_error_of_the_pass_is_raised():
    def broken():
        yield [1]
        raise ValueError("second")

    with pytest.raises(ValueError, match="second"):
        list(with_progress(broken(), 2, "counting"))
