"""The check finds each kind of fault on the right line, and nothing in valid data."""

import json
import re
import shutil
from pathlib import Path

import pytest
from cases import picture
from look_cases import asked, captioned, checked, grounded, sound

from qwenvl_ft.data.plan.packing import pack_lengths
from qwenvl_ft.errors import RecipeError
from qwenvl_ft.look.faults import ERROR, REASONS
from qwenvl_ft.look.forecast import histogram
from qwenvl_ft.look.selection import target_recipe

FAULTY = {
    "json": [
        ('{"image": ', "not valid JSON"),
        (b'{"image": "\xff"}', "not UTF-8"),
    ],
    "structure": [
        ({"text": "no format"}, "no format has the keys text"),
        (asked("a.png", 5), "conversations[1] must be"),
        ([1, 2], None),
        (captioned(width="wide"), "width='wide'"),
        (captioned(objects=[{"bbox_2d": [1, 2, 3, 4]}]), "objects[0].desc"),
    ],
    "tags": [
        (asked("a.png", question="<image><image> Same?"), "more <image> tags than media (1)"),
        (asked(["a.png", "b.png"]), "1 of 2 media have no <image> tag"),
        (asked("a.png", "It is <image>."), "gpt turn with a media tag"),
    ],
    "geometry": [
        (captioned(objects=[{"desc": "a", "bbox_2d": [10, 10, 60, 70]}]), "objects[0].bbox_2d[3]=70 is outside"),
        (captioned(objects=[{"desc": "a", "bbox_2d": [60, 10, 10, 50]}]), "x1=60 is not less than x2=10"),
        (captioned(objects=[{"desc": "a", "line": [60, 10, 10]}]), "has 3 numbers"),
        (asked("a.png", '{"bbox_2d": [100, 200, 1400, 300]}'), "is outside the image"),
        (asked("a.png", '{"x": [{"quad": [-1, 2, 3, 4, 5, 6, 7, 8]}]}'), "is outside the image"),
        (asked("a.png", '{"bbox_2d": [500, 200, 400, 300]}'), "is reversed"),
        (grounded((10, 10, 160, 50)), "is outside: x goes from 0 to 96"),
        (asked("a.png", '{"bbox_2d": [500, 200, 400]}'), "does not have exactly one of"),
    ],
    "empty_answer": [(asked("a.png", " "), "turn 1 is an answer without text")],
    "unsupervised": [
        ({"image": "a.png", "conversations": [{"from": "human", "value": "<image>"}]}, "no assistant turn"),
        (
            {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!", "loss": False}]},
            "no assistant turn",
        ),
    ],
    "duplicate": [(asked("a.png", id="again"), "data.jsonl:1")],
    "missing": [
        (asked("gone.png"), "gone.png does not exist"),
        (grounded(images=["gone.png"]), "gone.png does not exist"),
    ],
    "corrupt": [(asked("text.png"), "not an image"), (asked("half.png"), "damaged")],
    "size": [
        (captioned(height=65), "96x64 pixels, the record states 96x65"),
        (asked("b.png", "Stated.", width=128, height=64), "64x128 pixels, the record states 128x64"),
    ],
    "too_long": [(asked("a.png", "word " * 1500), "template.max_length is 1000")],
    "encoding": [(asked("a.png", "<|im_end|>"), "control token <|im_end|>")],
}
"""Reason -> records with this fault, and a part of the message."""
CASES = [(reason, record, message) for reason, cases in FAULTY.items() for record, message in cases]
LIMIT = "template.max_length=1000"


def as_line(record):
    return record.encode() if isinstance(record, str) else record


@pytest.mark.parametrize(("reason", "record", "message"), CASES, ids=[f"{r}-{k}" for k, (r, _, _) in enumerate(CASES)])
def test_one_fault_is_found_on_its_line_and_nothing_else_is(reason, record, message, data, tiny_dir):
    path = data([*sound(), as_line(record)])
    line = len(sound()) + 1
    report = checked(path, "--model", str(tiny_dir), LIMIT)
    assert {fault.reason for fault in report.faults} == {reason}
    where = {f"{path}:{line}"} if record != [1, 2] else {f"{path}:{line}[0]", f"{path}:{line}[1]"}
    assert {fault.where for fault in report.faults} == where
    assert message is None or message in report.faults[0].message
    assert not report.faults[0].message.startswith(str(path)), "the place belongs into `where`"
    assert report.ok == (REASONS[reason].level != ERROR)


def test_valid_data_of_every_format_has_no_fault(data, tiny_dir):
    report = checked(data(sound()), "--model", str(tiny_dir), LIMIT)
    assert report.ok
    assert not report.faults
    split = report.splits["train"]
    assert (split.records, split.images, len(split.media), split.encoded) == (5, 5, 2, 5)


def test_every_reason_has_a_case():
    elsewhere = {"file", "leak_record", "leak_media", "cut", "unforeseen", "too_large", "too_thin", "high_bit_depth"}
    assert set(FAULTY) | elsewhere == set(REASONS)
    assert not set(FAULTY) & elsewhere


def test_one_bad_record_hides_no_other(data, tiny_dir):
    """All faults in one file, between sound records; several processes look."""
    lines, expected = [], []
    for reason, record, _ in CASES:
        lines += [as_line(record)]
        if record != [1, 2]:
            expected.append((reason, len(lines)))
    lines[:0] = [as_line(sound()[0])]
    path = data(lines * 4)
    report = checked(path, "--model", str(tiny_dir), LIMIT, num_proc=2)
    assert report.records > 100
    found = {(fault.reason, fault.where) for fault in report.faults}
    assert {(reason, f"{path}:{line + 1}") for reason, line in expected} <= found


def test_without_a_model_everything_but_tokens_is_checked(data):
    needs_model = {"too_long"}
    for reason, record, _ in CASES:
        report = checked(data([*sound(), as_line(record)]))
        assert {fault.reason for fault in report.faults} == ({reason} - needs_model), record


def test_a_record_with_several_faults_has_them_all(data):
    record = captioned(
        images=["gone.png"],
        objects=[{"desc": "a", "bbox_2d": [0, 0, 500, 5]}, {"desc": "b", "quad": [1, 2]}, {"desc": "c"}],
    )
    report = checked(data([record]))
    assert [fault.reason for fault in report.faults] == ["geometry", "geometry", "geometry", "missing"]
    assert [f"objects[{k}]" in report.faults[k].message for k in range(3)] == [True] * 3


def test_an_unexpected_exception_is_a_fault_of_one_record(data, monkeypatch):
    from qwenvl_ft.look import one_record

    read = one_record.read_record
    monkeypatch.setattr(one_record, "read_record", lambda r, s, m: 1 // 0 if s.record.endswith(":2") else read(r, s, m))
    path = data(sound())
    report = checked(path)
    assert [(f.reason, f.where) for f in report.faults] == [("unforeseen", f"{path}:2")]
    assert "ZeroDivisionError" in report.faults[0].message


@pytest.mark.parametrize("copy", ["same file", "copied file", "other format"])
def test_validation_data_that_is_also_trained_on_is_found_by_content(copy, data, tmp_path):
    train = data(sound()[:2], "train.jsonl")
    name = "a.png" if copy == "same file" else "copy.png"
    if copy == "copied file":
        shutil.copy(tmp_path / "a.png", tmp_path / name)
    if copy == "other format":
        from PIL import Image

        Image.open(tmp_path / "a.png").save(tmp_path / "copy.bmp")
        (tmp_path / "copy.bmp").rename(tmp_path / name)
    val = data([asked("c.png"), asked(name, "Another answer."), asked(name, id="else")], "val.jsonl")
    report = checked(train, "--val_jsonl", str(val))
    assert [(f.reason, f.where) for f in report.faults] == [("leak_media", f"{val}:2"), ("leak_record", f"{val}:3")]
    assert f"{train}:1" in report.faults[0].message
    assert not report.ok
    assert checked(train, "--val_jsonl", str(val), allow=["leak_media", "leak_record"]).ok


def test_held_out_data_and_each_validation_set_are_checked_by_themselves(data):
    path = data([asked("a.png", f"Answer {k}.") for k in range(20)])
    held = checked(path, "data.split_dataset_ratio=0.2")
    assert {name: split.records for name, split in held.splits.items()} == {"train": 16, "val": 4}
    assert [fault.reason for fault in held.faults] == ["leak_media"] * 4
    one, two = data([asked("b.png")], "one.jsonl"), data([asked("gone.png")], "two.jsonl")
    several = checked(path, f"data.val={{x: {one}, y: {two}}}")
    assert list(several.splits) == ["train", "val.x", "val.y"]
    assert [(fault.reason, fault.where) for fault in several.faults] == [("missing", f"{two}:1")]


def test_the_same_question_about_another_image_is_no_duplicate(data):
    report = checked(data([asked("a.png"), asked("b.png"), asked("a.png", "Two blurs.")]))
    assert not report.faults


def test_the_same_question_with_another_tool_is_no_duplicate(data):
    turns = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "Here."}]
    tools = [[{"type": "function", "function": {"name": name, "parameters": {}}}] for name in ("look", "point")]
    assert not checked(data([{"messages": turns, "tools": each} for each in tools])).faults
    assert [f.reason for f in checked(data([{"messages": turns, "tools": tools[0]}] * 2)).faults] == ["duplicate"]


def test_a_record_that_is_drawn_twice_is_reported_once_and_is_no_duplicate(data):
    path = data([asked("a.png"), asked("gone.png")])
    report = checked(f"{path}%200")
    assert report.records == 4
    assert [(fault.reason, fault.where) for fault in report.faults] == [("missing", f"{path}:2")]


def test_files_that_cannot_be_opened_do_not_hide_the_others(data, tmp_path):
    cut = tmp_path / "cut.json"
    cut.write_text(json.dumps([asked("a.png"), asked("gone.png")])[:-1] + ', {"image"')
    empty = data([], "empty.jsonl")
    good = data([asked("half.png")], "good.jsonl")
    report = checked(tmp_path / "none.jsonl", str(cut), str(empty), str(good))
    assert {(f.reason, f.where) for f in report.faults} == {
        ("file", str(tmp_path / "none.jsonl")),
        ("json", f"{cut}:1"),
        ("missing", f"{cut}[1]"),
        ("file", str(empty)),
        ("corrupt", f"{good}:1"),
    }


@pytest.mark.parametrize(("strategy", "reason", "ok"), [("right", "cut", True), ("raise", "too_long", False)])
def test_the_recipe_decides_what_happens_to_long_records(strategy, reason, ok, data, tiny_dir):
    long = asked("a.png", "word " * 1500)
    report = checked(data([*sound(), long]), "--model", str(tiny_dir), LIMIT, "--truncation_strategy", strategy)
    assert [fault.reason for fault in report.faults] == [reason]
    assert report.ok == ok
    assert max(report.splits["train"].lengths) > 1500, "the histogram shows its full length"
    assert report.splits["train"].forecast.longest <= 1000


def test_the_forecast_is_the_plan_that_training_makes(data, encoder, tiny_dir):
    records = [asked("a.png", "word " * k) for k in range(1, 30)]
    path = data(records)
    words = ["--model", str(tiny_dir), "--max_length", "200", "training.gradient_accumulation_steps=2"]
    expected = checked(path, *words, processes=3).splits["train"].forecast
    samples = [encoder(record, media_root=str(path.parent)) for record in records]
    lengths = [len(sample["input_ids"]) for sample in samples]
    rows = pack_lengths(lengths, max_length=200, seed=42)
    assert (expected.samples, expected.tokens, expected.rows) == (29, sum(lengths), len(rows))
    assert expected.fill == pytest.approx(sum(lengths) / (200 * len(rows)))
    assert expected.steps_per_epoch == -(-len(rows) // 6)
    image = int((samples[0]["input_ids"] == encoder.processor.image_token_id).sum())
    assert expected.vision_share == pytest.approx(29 * image / sum(lengths))
    supervised = sum(int((sample["labels"] != -100).sum()) for sample in samples)
    assert expected.supervised_share == pytest.approx(supervised / sum(lengths))
    alone = checked(path, *words, "training.packing=false").splits["train"].forecast
    assert (alone.rows, alone.fill, alone.steps_per_epoch) == (29, None, 15)
    assert expected.samples_per_step == 29 / expected.steps_per_epoch
    assert alone.step == "2 samples (1 x 2 accumulated x 1 processes; the last of an epoch holds 1 sample)"


def test_recipes_and_files_are_distinguished(tmp_path):
    assert target_recipe(["digits"]).data.train == ".demo/digits/train.jsonl"
    assert target_recipe(["a.jsonl%50", "b,c.json", "--max_length", "7"]).data.train == ["a.jsonl%50", "b,c.json"]
    trained = target_recipe(["recipe=digits", "data.train=a.jsonl"])
    assert (trained.data.train, trained.template) == ("a.jsonl", target_recipe(["digits"]).template)
    assert target_recipe(["--config", "recipes/digits.yaml"]).template == trained.template
    assert target_recipe(["--jsonl", "a.jsonl", "--val_jsonl", "b.jsonl"]).data.val == "b.jsonl"
    mixed = target_recipe(["digits", "a.jsonl", "training.packing=false"])
    assert (mixed.data.train, mixed.training.packing) == (["a.jsonl"], False)
    with pytest.raises(RecipeError, match="are several recipes"):
        target_recipe(["digits", "lora_4b"])
    with pytest.raises(RecipeError, match="name a recipe or data files"):
        target_recipe(["--packing", "false"])


def test_a_histogram_has_round_borders_and_every_value():
    assert histogram([1, 2, 2, 9], 4) == [(0, 2, 1), (2, 4, 2), (4, 6, 0), (6, 8, 0), (8, 10, 1)]
    assert histogram([31] * 5) == [(31, 32, 5)]
    assert histogram([]) == []
    bars = histogram([0.05, 0.31, 0.99])
    assert sum(count for _, _, count in bars) == 3
    assert bars[0][0] == 0
    assert histogram([100, 5000])[-1] == (5000, 5500, 1)


def test_the_guide_has_every_reason():
    guide = (Path(__file__).resolve().parents[2] / "docs/look.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| (.*) \|$", guide, flags=re.MULTILINE)
    assert [(name, part) for name, part, _ in rows] == [(n, r.part.lower()) for n, r in REASONS.items()]
    assert all(text.replace("`", "").startswith(REASONS[name].meaning.split(": ")[0]) for name, _, text in rows)


def test_video_files_are_decoded_where_there_is_a_model(data, tiny_dir, tmp_path):
    av = pytest.importorskip("av")
    whole = tmp_path / "whole.mkv"
    with av.open(str(whole), "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for seed in range(16):
            container.mux(stream.encode(av.VideoFrame.from_image(picture(64, 64, seed))))
        container.mux(stream.encode())
    (tmp_path / "cut.mkv").write_bytes(whole.read_bytes()[:200])
    turns = [{"from": "human", "value": "<video>"}, {"from": "gpt", "value": "x"}]
    path = data([{"video": name, "conversations": turns} for name in ("whole.mkv", "cut.mkv", "gone.mkv")])
    report = checked(path, "--model", str(tiny_dir))
    assert [(f.reason, f.where) for f in report.faults] == [("corrupt", f"{path}:2"), ("missing", f"{path}:3")]
    assert report.splits["train"].forecast.samples == 1
