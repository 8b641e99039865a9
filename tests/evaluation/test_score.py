"""``qwenvl-ft score`` gives the scores computed by hand, reads several forms of files, and names what is wrong."""

import json

import pytest

from qwenvl_ft.cli.main import main

ROOM = {
    "references": [
        # a box, a quad that is a right triangle's double, and a line
        [
            {"desc": "door/open", "bbox_2d": [0, 0, 100, 100]},
            {"desc": "sign", "quad": [200, 0, 300, 0, 300, 100, 200, 100]},
            {"desc": "wire", "line": [0, 500, 500, 500, 1000, 500]},
        ],
        [{"desc": "door", "bbox_2d": [0, 0, 10, 10]}, {"desc": "door", "bbox_2d": [500, 500, 600, 600]}],
    ],
    "answers": [
        # the box moved by 20 of 100: IoU 80 / 120; the lower half of the quad's diagonal: IoU 1/2; the line 10 lower
        [
            {"desc": "door/shut", "bbox_2d": [20, 0, 120, 100]},
            {"desc": "sign", "quad": [200, 0, 300, 100, 250, 100, 200, 100]},
            {"desc": "wire", "line": [1000, 510, 0, 510]},
        ],
        [{"desc": "window", "bbox_2d": [500, 500, 600, 600]}, {"desc": "door", "bbox_2d": [0, 0, 10, 10]}],
    ],
}


def run(capsys, *words):
    code = main(["score", *map(str, words)])
    return code, *capsys.readouterr()


def write(path, values):
    path.write_text("".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values), encoding="utf-8")
    return path


@pytest.fixture
def room(tmp_path):
    pairs = zip(ROOM["references"], ROOM["answers"], strict=True)
    lines = [{"reference": json.dumps(r), "prediction": json.dumps(a)} for r, a in pairs]
    return write(tmp_path / "room.jsonl", lines)


def test_boxes_quads_and_lines_are_each_scored_as_by_hand(capsys, room):
    """Boxes: two of three found (IoU 2/3 and 1), the third has another class. The quad has an IoU of exactly 1/2, which
    is not above 0.5. The line is 10 / (1000 sqrt 2) = 0.0071 diagonals off."""
    code, out, _ = run(capsys, "--metric", "geometry", "--data", room, "--json")
    scores = json.loads(out)
    assert code == 0
    assert {key: scores["bbox"][key] for key in ("tp", "fp", "fn")} == {"tp": 2, "fp": 1, "fn": 1}
    assert scores["bbox"]["f1"] == pytest.approx(2 / 3)
    assert scores["bbox"]["mean_likeness"] == pytest.approx((80 / 120 + 1) / 2)
    assert scores["quad"]["f1"] == 0.0
    assert scores["line"]["f1"] == 1.0
    assert scores["line"]["mean_likeness"] == pytest.approx(1 - 10 / (1000 * 2**0.5))
    assert scores["f1"] == pytest.approx(2 * 3 / (5 + 5))
    assert (scores["metric"], scores["primary"], scores["count"], scores["n_unparsed"]) == ("geometry", "f1", 2, 0)
    looser = json.loads(run(capsys, "--metric", "geometry", "--data", room, "--json", "--option", "iou=0.45")[1])
    assert looser["quad"]["f1"] == 1.0
    assert looser["quad"]["mean_likeness"] == pytest.approx(0.5)
    any_class = json.loads(run(capsys, "--metric", "geometry", "--data", room, "--json", "--option", "by_class=no")[1])
    assert any_class["bbox"]["f1"] == 1.0


def test_people_read_one_line_and_all_scores(capsys, room):
    code, out, _ = run(capsys, "--metric", "geometry", "--data", room)
    assert code == 0
    assert out.splitlines()[0] == "geometry 60.00% of 2 (bbox 66.67%, quad 0.00%, line 100.00%)"
    assert "tp 2  fp 1  fn 1" in out


@pytest.mark.parametrize(
    ("reference", "answer"),
    [("reference", "prediction"), ("labels", "response"), ("label", "predict"), ("expected", "answer")],
)
def test_keys_of_several_tools_are_read(capsys, tmp_path, reference, answer):
    file = write(tmp_path / "a.jsonl", [{reference: "a cat", answer: "a cat"}, {reference: "a dog", answer: "A dog"}])
    assert run(capsys, "--metric", "exact_match", "--data", file)[1].startswith("exact match 50.00% of 2")
    folded = run(capsys, "--metric", "exact_match", "--data", file, "--option", "ignore_case=true")[1]
    assert folded.startswith("exact match 100.00% of 2")


def test_training_records_are_references_for_answers_in_a_second_file(capsys, tmp_path):
    """The last assistant turn counts, in any training format; answers are texts or what ``infer --json`` prints."""
    turns = [{"from": "human", "value": "How many?"}, {"from": "gpt", "value": "12"}]
    messages = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "20"}]
    data = write(tmp_path / "val.jsonl", [{"conversations": turns}, {"messages": messages}])
    answers = write(tmp_path / "answers.jsonl", ["I count 12.", {"answer": "23", "model": "m"}])
    out = run(capsys, "--metric", "counting", "--data", data, "--answers", answers, "--json")[1]
    assert json.loads(out)["mae"] == pytest.approx(1.5)
    text = run(capsys, "--metric", "counting", "--data", data, "--answers", answers)[1]
    assert text.startswith("counting mae 1.5 of 2"), "an error is no share"


def test_sizes_of_images_change_the_distance_of_lines(capsys, tmp_path):
    line, moved = (json.dumps([{"line": [0, y, 90, y]}]) for y in (10, 13))
    plain = {"reference": line, "prediction": moved}
    for sizes, found in ((None, 1), ([[2000, 1500]], 1), ([[90, 40]], 0)):
        file = write(tmp_path / "l.jsonl", [plain if sizes is None else plain | {"sizes": sizes}])
        assert json.loads(run(capsys, "--metric", "geometry", "--data", file, "--json")[1])["line"]["tp"] == found


@pytest.mark.parametrize(
    ("lines", "more", "message"),
    [
        (['{"reference": "1", "prediction": "1"', ""], [], "d.jsonl:1 is not a line of JSON"),
        (["", ""], [], "d.jsonl has no lines"),
        (['{"reference": "1"}'], [], "d.jsonl:1 has no text under prediction, answer, response, predict"),
        (['{"prediction": "1"}'], [], "d.jsonl:1 has no text under reference, expected, labels, label"),
        (['{"reference": "1", "prediction": null}'], [], "d.jsonl:1 has no text under prediction"),
        (['{"reference": "many", "prediction": "1"}'], [], "d.jsonl:1: counting cannot score this answer"),
        (['{"reference": "1", "prediction": "1"}'], ["--option", "iou=1"], "--option: 'iou' is no option of this"),
        (['{"reference": "1", "prediction": "1"}'], ["--option", "iou"], "--option iou has no value"),
        (['{"reference": "1", "prediction": "1"}'], ["--answers", "none.jsonl"], "none.jsonl cannot be read"),
        (['{"conversations": [{"from": "human", "value": "?"}]}'], [], "d.jsonl:1"),
    ],
)
def test_a_wrong_file_is_one_line_that_names_it(capsys, tmp_path, monkeypatch, lines, more, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d.jsonl").write_text("\n".join(lines))
    code, _, error = run(capsys, "--metric", "counting", "--data", "d.jsonl", *more)
    assert code == 2
    assert message in error
    assert error.count("\n") == 1


def test_unequal_files_and_unknown_metrics_are_refused(capsys, tmp_path):
    data = write(tmp_path / "d.jsonl", [{"reference": "1"}, {"reference": "2"}])
    answers = write(tmp_path / "a.jsonl", ["1"])
    assert "has 1 answers, but" in run(capsys, "--metric", "counting", "--data", data, "--answers", answers)[2]
    assert (
        "unknown --metric 'geometri'. Did you mean 'geometry'?"
        in run(capsys, "--metric", "geometri", "--data", data)[2]
    )
