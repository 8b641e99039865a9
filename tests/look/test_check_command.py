"""What the command check prints, and its exit code."""

import json

from look_cases import asked, sound
from video_cases import film

from qwenvl_ft.cli.main import main
from qwenvl_ft.look.faults import REASONS

TURN = {"from": "human", "value": "Hello?"}


def test_the_command_prints_the_summary_and_returns_an_exit_code(data, tiny_dir, capsys):
    good, bad = data(sound()), data([*sound(), asked("gone.png", id="lost"), asked("half.png")], "bad.jsonl")
    assert main(["check", str(good), "--model", str(tiny_dir)]) == 0
    out = capsys.readouterr().out
    for line in (
        "TEST SUMMARY",
        "Annotation Tests: PASSED",
        "  Total samples: 5",
        "  Datasets: 1",
        "Image Tests: PASSED",
        "  Images tested: 5",
        "  Missing: 0",
        "  Corrupted: 0",
        "Model Tests: PASSED",
    ):
        assert line in out.splitlines()
    assert out.rstrip().endswith("ALL TESTS PASSED - Ready for training")
    assert main(["check", str(bad)]) == 1
    out = capsys.readouterr().out
    assert f"{bad}:6 (id 'lost'): image" in out
    assert "Image Tests: FAILED" in out
    assert "  Missing: 1" in out
    assert "  Corrupted: 1" in out
    assert "Model Tests: SKIPPED" in out
    assert "ALL TESTS PASSED" not in out
    assert out.index("gone.png does not exist") < out.index("train: 7 records, 7 images"), "before the figures"
    last = out.rstrip().splitlines()[-2:]
    assert last[0].startswith(f"FAILED: 2 errors; the first: {bad}:6: image ")
    assert last[1].startswith("Exit code 1: ")


def test_the_last_lines_say_what_the_exit_code_means(data, capsys):
    """For warnings alone, with and without --strict."""
    path = str(data([asked("a.png"), asked("a.png")]))
    assert main(["check", path]) == 0
    assert capsys.readouterr().out.rstrip().splitlines()[-2:] == [
        "Exit code 0: no errors, 1 warning.",
        "ALL TESTS PASSED - Ready for training",
    ]
    assert main(["check", path, "--strict"]) == 1
    last = capsys.readouterr().out.rstrip().splitlines()[-2:]
    assert last[0].startswith(f"FAILED by --strict: 1 warning; the first: {path}:2: the same as")
    assert last[1].startswith("Exit code 1: ")


def test_a_phase_that_fails_is_not_followed_by_a_verdict_that_all_passed(data, tmp_path, capsys):
    good, bad = data([asked("a.png")], "good.jsonl"), data([asked("gone.png")], "bad.jsonl")
    recipe = tmp_path / "two.yaml"
    recipe.write_text(
        f"phases:\n  - {{name: one, data: {{train: {bad}}}}}\n  - {{name: two, data: {{train: {good}}}}}\n"
    )
    assert main(["check", str(recipe)]) == 1
    out = capsys.readouterr().out
    assert "ALL TESTS PASSED" not in out
    assert out.rstrip().splitlines()[-2].startswith(f"FAILED: 1 error; the first: {bad}:1: ")


def test_videos_are_counted_as_videos(data, tmp_path, capsys):
    film(str(tmp_path / "v.mp4"))
    shown = {"video": ["v.mp4"], "conversations": [TURN | {"value": "<video>?"}, {"from": "gpt", "value": "It moves."}]}
    frames = shown | {"video": [["a.png", "a.png"]]}
    assert main(["check", str(data([shown, frames]))]) == 0
    out = capsys.readouterr().out
    assert "train: 2 records, 2 videos, 2 different media" in out
    assert "Video Tests: PASSED\n  Videos tested: 2 (opened; frames are decoded only with a model)\n" in out
    assert "Image" not in out
    assert main(["check", str(data([shown, asked("b.png")]))]) == 0
    out = capsys.readouterr().out
    assert "Image and Video Tests: PASSED\n  Images tested: 1\n  Videos tested: 1" in out
    assert main(["check", str(data([shown | {"video": ["gone.mp4"]}]))]) == 1
    assert "Video Tests: FAILED\n  Videos tested: 1 (" in capsys.readouterr().out
    assert main(["check", str(data([{"conversations": [TURN, {"from": "gpt", "value": "Hello."}]}]))]) == 0
    assert "Image Tests: SKIPPED (no record has an image or a video)" in capsys.readouterr().out


def test_json_has_every_case(data, tiny_dir, capsys):
    bad = data([asked(f"gone{k}.png") for k in range(7)] + [asked("a.png"), asked("a.png")])
    assert main(["check", str(bad), "--json", "--model", str(tiny_dir)]) == 1
    printed = json.loads(capsys.readouterr().out)
    assert printed["records"] == 9
    assert [case["where"] for case in printed["faults"]["missing"]["cases"]] == [f"{bad}:{k}" for k in range(1, 8)]
    assert printed["faults"]["duplicate"] | {"cases": 0} == {
        "level": "warning",
        "count": 1,
        "meaning": REASONS["duplicate"].meaning,
        "cases": 0,
    }
    assert sum(bar["count"] for bar in printed["splits"]["train"]["lengths"]) == 2
    assert printed["splits"]["train"]["epoch"]["samples"] == 2
    assert (printed["exit_code"], printed["errors"], printed["warnings"]) == (1, 7, 1)
    assert printed["tests"] == {"Annotation": True, "Image": False, "Model": True}
    assert main(["check", str(bad), "--json"]) == 1
    unasked = json.loads(capsys.readouterr().out)
    assert unasked["tests"] == printed["tests"] | {"Model": None}, "nothing was tokenized, so nothing passed"
    assert (printed["splits"]["train"]["images"], printed["splits"]["train"]["videos"]) == (9, 0)


def test_warnings_fail_only_with_strict(data, capsys):
    path = str(data([asked("a.png"), asked("a.png")]))
    assert main(["check", path]) == 0
    assert main(["check", path, "--strict"]) == 1
    assert main(["check", path, "--allow", "duplicates"]) == 2
    assert "Did you mean 'duplicate'?" in capsys.readouterr().err
