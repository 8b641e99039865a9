"""The page shows the samples and rows of training, and needs no external resources."""

import base64
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from cases import picture
from look_cases import asked, captioned, sound
from PIL import Image

from qwenvl_ft.cli.main import main
from qwenvl_ft.data.collate import QwenVLCollator
from qwenvl_ft.data.encode.encoder import Encoder
from qwenvl_ft.data.plan.packing import pack_lengths
from qwenvl_ft.errors import RecipeError
from qwenvl_ft.look.pictures import data_uri, pictures
from qwenvl_ft.look.placing import placed_objects
from qwenvl_ft.look.selection import target_recipe
from qwenvl_ft.look.show import show_recipe
from qwenvl_ft.look.tokens import pieces, supervised_texts, texts_before_media

IGNORE = -100


class Page(HTMLParser):
    """Parses a page: ids, labels, pictures and shapes of each sample, ids and labels of each part of a row."""

    VOID = ("meta", "img", "wbr")

    def __init__(self, text):
        super().__init__()
        self.samples, self.rows, self.open, self.tags = {}, [], [], []
        self.now, self.in_row = None, False
        self.feed(text)
        assert not self.open, "a tag is not closed"

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        classes = attributes["class"].split() if "class" in attributes else []
        self.tags.append((tag, attributes))
        if tag not in self.VOID:
            self.open.append(tag)
        if "data-sample" in attributes:
            self.now = self.samples[attributes["data-sample"]] = self.new()
        if "data-row" in attributes:
            self.in_row = True
            self.rows.append([])
        if "tokens" in classes and self.in_row:
            self.now = self.new()
            self.rows[-1].append(self.now)
        if "data-i" in attributes:
            ids = [int(token) for token in attributes["data-i"].split()] * int(
                attributes["data-n"] if "data-n" in attributes else 1
            )
            self.now["ids"] += ids
            self.now["labels"] += ids if "on" in classes else [IGNORE] * len(ids)
        if tag == "img":
            self.now["images"].append(Image.open(io.BytesIO(base64.b64decode(attributes["src"].partition(",")[2]))))
        if "mark" in classes:
            self.now["shapes"].append((tag, attributes))

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    @staticmethod
    def new():
        return {"ids": [], "labels": [], "images": [], "shapes": []}


def shown(path, tiny_dir, tmp_path, *words, **options):
    recipe = target_recipe([str(path), "--model", str(tiny_dir), "--max_length", "1500", *words])
    return Page(show_recipe(recipe, tmp_path / "page.html", **options).read_text(encoding="utf-8"))


SPOKEN = [
    {
        "conversations": [
            {"from": "human", "value": "Tell"},
            {"from": "gpt", "value": "多 🙂 e\u0301\tline\n\nend \ufffd"},
        ]
    },
    {"conversations": [{"from": "human", "value": "<b>&amp;</b>"}, {"from": "gpt", "value": "</i></script><script>"}]},
    asked(
        ["a.png", "b.png"],
        "No.",
        "<image>\n<image>\nWhat did the assistant say?",
    ),
    {
        "video": [["a.png", "a.png", "a.png"]],
        "conversations": [{"from": "human", "value": "<video>Moves?"}, {"from": "gpt", "value": "Nothing."}],
    },
]


def test_the_page_has_every_samples_ids_and_labels(data, tiny_dir, tmp_path, processor):
    records = [*sound(), *SPOKEN]
    path = data(records)
    page = shown(path, tiny_dir, tmp_path, samples=99)
    encoder = Encoder(processor, max_length=1500)
    assert list(page.samples) == [f"{path}:{k}" for k in range(1, len(records) + 1)]
    for record, found in zip(records, page.samples.values(), strict=True):
        sample = encoder(record, media_root=str(path.parent))
        assert found["ids"] == sample["input_ids"].tolist()
        assert found["labels"] == sample["labels"].tolist()
        assert set(found["labels"]) - {IGNORE}, "vacuous: nothing is supervised"


def test_rows_are_those_of_the_epoch_with_their_boundaries(data, tiny_dir, tmp_path, processor):
    records = [asked("a.png", "word " * k) for k in range(3, 40)]
    path = data(records)
    page = shown(path, tiny_dir, tmp_path, "template.max_length=300", samples=1, rows=3, epoch=1)
    encoder = Encoder(processor, max_length=300)
    samples = [encoder(record, media_root=str(path.parent)) for record in records]
    plan = pack_lengths([len(s["input_ids"]) for s in samples], max_length=300, seed=42, epoch=1)
    assert len(page.rows) == 3
    assert plan[:3] != pack_lengths([len(s["input_ids"]) for s in samples], max_length=300, seed=42, epoch=0)[:3]
    for row, indices in zip(page.rows, plan, strict=False):
        assert [part["ids"] for part in row] == [samples[k]["input_ids"].tolist() for k in indices]
        batch = QwenVLCollator()([samples[k] for k in indices])
        assert [label for part in row for label in part["labels"]] == batch["labels"][0].tolist()
    assert max(map(len, page.rows)) > 1, "vacuous: no border in any row"


def test_pictures_are_what_the_model_gets(data, tiny_dir, tmp_path):
    """64 x 128 needs no resize, so the pixels are the file's; 50 x 70 does."""
    path = data([asked("b.png"), asked("c.png")])
    page = shown(path, tiny_dir, tmp_path)
    first, second = (found["images"][0] for found in page.samples.values())
    assert np.array_equal(np.asarray(first), np.asarray(Image.open(tmp_path / "b.png")))
    assert second.size == (64, 64)


def test_normalised_patches_and_raw_ones_give_the_same_picture(processor):
    images = [picture(96, 64), picture(64, 128)]
    normal, raw = (Encoder(processor, raw_pixels=flag) for flag in (False, True))
    record = asked(images, "No.", "<image><image>")
    for encoder in (normal, raw):
        sample = encoder(record)
        for found, image in zip(
            pictures(sample["pixel_values"], sample["image_grid_thw"], processor.image_processor), images, strict=True
        ):
            assert len(found) == 1
            assert np.array_equal(np.asarray(found[0]), np.asarray(image))
    shuffled = sample["pixel_values"].roll(1, 0)
    (wrong,) = pictures(shuffled, sample["image_grid_thw"], processor.image_processor)[0]
    assert not np.array_equal(np.asarray(wrong), np.asarray(images[0]))


def test_a_videos_frames_come_in_their_order(processor):
    frames = [picture(64, 64, seed) for seed in range(4)]
    record = {
        "video": [frames],
        "conversations": [{"from": "human", "value": "<video>"}, {"from": "gpt", "value": "x"}],
    }
    sample = Encoder(processor)(record)
    (found,) = pictures(sample["pixel_values_videos"], sample["video_grid_thw"], processor.video_processor)
    assert len(found) == 4
    for image, frame in zip(found, frames, strict=True):
        resized = np.asarray(frame.resize(image.size, Image.Resampling.BICUBIC), dtype=float)
        assert np.abs(np.asarray(image, dtype=float) - resized).mean() < 2
    assert np.abs(np.asarray(found[0], float) - np.asarray(found[1], float)).mean() > 10, "vacuous: frames are alike"


def test_boxes_quads_and_lines_are_drawn_where_the_answer_says(data, tiny_dir, tmp_path):
    objects = [
        {"desc": "box/red", "bbox_2d": [12, 16, 48, 48]},
        {"desc": "card", "quad": [0, 0, 96, 0, 96, 64, 0, 64]},
        {"desc": "wire/thin", "line": [0, 0, 48, 32, 96, 0]},
    ]
    answer = json.dumps([{"bbox_2d": [100, 200, 900, 1000], "label": "blur"}])
    page = shown(data([asked("b.png", answer), captioned(objects=objects)]), tiny_dir, tmp_path)
    plain, dense = (found["shapes"] for found in page.samples.values())
    assert [tag for tag, _ in dense] == ["rect", "polygon", "polyline"]
    assert [float(dense[0][1][key]) for key in ("x", "y", "width", "height")] == pytest.approx([12, 16, 36, 32])
    points = [[float(value) for value in re.findall(r"[\d.]+", shape["points"])] for _, shape in dense[1:]]
    assert points == [pytest.approx([0, 0, 96, 0, 96, 64, 0, 64]), pytest.approx([0, 0, 48, 32, 96, 0])]
    (tag, shape) = plain[0]
    assert tag == "rect"
    assert [float(shape[key]) for key in ("x", "y", "width", "height")] == pytest.approx([6.4, 25.6, 51.2, 102.4])


@pytest.mark.parametrize(
    ("answer", "units", "expected"),
    [
        ([[1100, 40, 1200, 80]], "pixels", [(0.55, 0.1), (0.6, 0.2)]),
        ([[110, 40, 120, 80]], "norm1000", [(0.11, 0.04), (0.12, 0.08)]),
        ([[0.1, 0.25, 0.5, 1]], "unit", [(0.1, 0.25), (0.5, 1)]),
    ],
)
def test_units_follow_from_the_numbers(answer, units, expected):
    placed, found = placed_objects([json.dumps(answer)], [""], [(2000, 400)])
    assert found == units
    assert placed[0].points == [pytest.approx(point) for point in expected]


def test_objects_go_to_the_picture_that_their_key_names():
    answer = {
        "P_2": {"object_1": {"desc": "a", "bbox_2d": [0, 0, 10, 10]}},
        "P_1": {"object_1": {"desc": "b", "bbox_2d": [0, 0, 20, 20]}},
    }
    before = ["P_1: ", "P_1: ", "P_2: "]
    placed, _ = placed_objects([json.dumps(answer)], before, [(10, 10)] * 3)
    assert [(each.desc, each.picture) for each in placed] == [("a", 2), ("b", 0), ("b", 1)]
    unknown, _ = placed_objects(['[{"bbox_2d": [1, 2, 3, 4]}]'], ["", ""], [(10, 10)] * 2)
    assert [each.picture for each in unknown] == [None]


def test_tokens_that_share_a_character_are_one_piece(processor):
    text = "多🙂"
    ids = processor.tokenizer(text)["input_ids"]
    sequence = pieces(ids, ids, processor.tokenizer)
    assert "".join(piece.text for piece in sequence) == text
    assert any(len(piece.ids) > 1 for piece in sequence), "vacuous: every character is one token"
    assert [token for piece in sequence for token in piece.ids] == ids


def test_supervised_text_and_the_text_before_images(processor, tmp_path):
    record = asked([picture(64, 64), picture(64, 64)], "Yes, it is.", "A: <image> B: <image> Same?")
    sample = Encoder(processor)(record)
    sequence = pieces(sample["input_ids"].tolist(), sample["labels"].tolist(), processor.tokenizer)
    assert supervised_texts(sequence) == ["Yes, it is.\n"]
    assert [text.split("\n")[-1].strip() for text in texts_before_media(sequence)] == ["A:", "B:"]


def test_the_page_loads_nothing_and_runs_nothing(data, tiny_dir, tmp_path):
    path = data([*sound(), *SPOKEN])
    page = shown(path, tiny_dir, tmp_path, samples=99)
    assert not [tag for tag, _ in page.tags if tag in ("script", "link", "iframe", "object")]
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), f"{tag} runs {name}"
            if name in ("src", "href"):
                assert value.startswith(("data:image/", "#"))
    text = (tmp_path / "page.html").read_text()
    assert "@import" not in text
    assert "url(" not in text
    targets = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    assert {attributes["href"][1:] for tag, attributes in page.tags if tag == "a"} <= targets


def test_the_source_record_is_shown_without_its_bytes(data, tiny_dir, tmp_path):
    (tmp_path / "x.png").write_bytes(b"")
    uri = "data:image/png;base64," + data_uri(picture(64, 64)).partition(",")[2]
    shown(data([asked(uri, id="first-record")]), tiny_dir, tmp_path)
    text = (tmp_path / "page.html").read_text()
    source = re.search(r'<pre class="source">(.*?)</pre>', text, flags=re.DOTALL)[1]
    assert "first-record" in source
    assert len(source) < 3000 < len(uri)


def test_large_pictures_are_jpeg_and_small_ones_exact():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (800, 800, 3), dtype=np.uint8))
    assert data_uri(noise).startswith("data:image/jpeg")
    assert data_uri(picture(64, 64)).startswith("data:image/png")


def test_the_command_writes_the_page(data, tiny_dir, tmp_path, capsys):
    path, out = data(sound()), tmp_path / "deep" / "look.html"
    assert main(["show", str(path), "--out", str(out), "--samples", "2", "--model", str(tiny_dir)]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    page = Page(out.read_text())
    assert list(page.samples) == [f"{path}:1", f"{path}:5"]
    assert main(["show", str(path), "--model", str(tiny_dir), "--units", "norm10"]) == 2
    assert "Did you mean" in capsys.readouterr().err


def test_showing_missing_data_is_an_error(data, tiny_dir, tmp_path):
    with pytest.raises(RecipeError, match="split val"):
        shown(data(sound()), tiny_dir, tmp_path, split="val")
    with pytest.raises(RecipeError, match=r"model\.model"):
        show_recipe(target_recipe([str(data(sound()))]), tmp_path / "page.html")


def test_the_two_halves_of_a_still_picture_are_one_frame(processor):
    sample = Encoder(processor)(asked(picture(64, 64)))
    (found,) = pictures(sample["pixel_values"], sample["image_grid_thw"], processor.image_processor)
    assert len(found) == 1
    changed = sample["pixel_values"].clone()
    changed.view(len(changed), 3, 2, -1)[:, :, 1] = torch.zeros(())
    assert len(pictures(changed, sample["image_grid_thw"], processor.image_processor)[0]) == 2


def test_validation_sets_are_shown_by_name(data, tiny_dir, tmp_path):
    train, val = data(sound()), data([asked("c.png")], "v.jsonl")
    page = shown(train, tiny_dir, tmp_path, f"data.val={{x: {val}}}", split="val.x")
    assert list(page.samples) == [f"{val}:1"]
