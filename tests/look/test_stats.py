"""Sums and counts of a hand-made data set, worked out by hand."""

import json
import re
from collections import Counter

import pytest
from dense_cases import dense_settings, write_dense
from look_cases import asked, captioned, sound

from qwenvl_ft.assemble import build_datasets, build_processor
from qwenvl_ft.cli.main import main
from qwenvl_ft.data.encode.encoder import Encoder
from qwenvl_ft.errors import RecipeError
from qwenvl_ft.look.forecast import histogram, quantiles
from qwenvl_ft.look.selection import target_recipe
from qwenvl_ft.look.stats import LONGEST_TEXT, count_recipe
from qwenvl_ft.recipe.load import load_recipe

OBJECTS = [
    {"desc": "box/red", "bbox_2d": [10, 10, 60, 50]},
    {"desc": "box/blue", "bbox_2d": [1, 1, 6, 5]},
    {"desc": "wire", "line": [0, 0, 9, 9]},
]
RECORDS = [
    asked("a.png", "A red cat."),  # 96 x 64
    asked(["a.png", "b.png"], "A red cat.", "<image>\n<image>\nSame?"),  # b: 64 x 128
    {
        "conversations": [
            {"from": "human", "value": "Hi"},
            {"from": "gpt", "value": "红猫 cat's"},
            {"from": "human", "value": "Hi"},
            {"from": "gpt", "value": "Not learned", "loss": False},
        ]
    },
    asked("a.png", '[{"bbox_2d": [0, 0, 9, 9], "label": "box"}, {"quad": [0, 0, 9, 0, 9, 9, 0, 9], "label": "card"}]'),
    asked("a.png", "[[1, 2, 3, 4], [5, 6, 7, 8]]"),
]


def counted(path, *words, **options):
    return count_recipe(target_recipe([str(path), *words]), quiet=True, **options)


def test_all_counts_equal_those_counted_by_hand(data):
    found = counted(data(RECORDS))
    assert (found.records, found.unread) == (5, 0)
    assert found.numbers["images"] == [1, 2, 0, 1, 1]
    assert found.numbers["longest_side"] == [96, 96, 128, 96, 96]
    assert found.numbers["turns"] == [1, 1, 1, 1, 1]
    assert found.numbers["answer_characters"][:3] == [10, 10, 8]
    assert found.numbers["objects"] == [2, 2]
    assert found.counts["kinds"] == {"bbox": 3, "quad": 1}
    assert found.counts["classes"] == {"box": 1, "card": 1, "(none)": 2}
    assert found.counts["answers"].most_common(1) == [("A red cat.", 2)]
    assert len(found.counts["answers"]) == 4
    assert found.counts["prompts"] == {"What is it?": 3, "Same?": 1, "Hi": 2}
    words = found.counts["words"]
    assert [words[word] for word in ("a", "red", "cat", "红", "猫", "cat's", "learned", "box")] == [
        2,
        2,
        2,
        1,
        1,
        1,
        0,
        1,
    ]
    assert found.numbers["tokens"] == []


def test_objects_of_dense_captions_are_counted_by_class_and_kind(data):
    found = counted(data([captioned(objects=OBJECTS), captioned(), captioned(objects=[])]))
    assert found.counts["classes"] == {"box": 3, "wire": 1}
    assert found.counts["kinds"] == {"bbox": 3, "line": 1}
    assert found.numbers["objects"] == [3, 1]


def test_tokens_of_samples_are_counted_even_if_too_long(data, tiny_dir, processor):
    path = data(sound())
    found = counted(path, "--model", str(tiny_dir), "--max_length", "40")
    samples = [Encoder(processor)(record, media_root=str(path.parent)) for record in sound()]
    assert found.numbers["tokens"] == [len(sample["input_ids"]) for sample in samples]
    assert found.numbers["learned"] == [int((sample["labels"] != -100).sum()) for sample in samples]
    image = processor.image_token_id
    assert found.numbers["vision"] == [int((sample["input_ids"] == image).sum()) for sample in samples]
    assert max(found.numbers["tokens"]) > 40, "vacuous: nothing is too long"


def test_several_processes_count_the_same(data):
    path = data(RECORDS * 40)
    one, two = counted(path, num_proc=1), counted(path, num_proc=2)
    assert one == two
    assert one.records == 200
    assert one.counts["kinds"] == {"bbox": 120, "quad": 40}


def test_unreadable_records_are_reported_and_not_counted(data, capsys):
    path = data([*RECORDS, asked("gone.png"), b"{", {"text": 1}])
    found = counted(path)
    assert (found.records, found.unread) == (8, 3)
    assert f"{path}:6" in found.first_fault
    assert found.counts["answers"] == counted(data(RECORDS, "good.jsonl")).counts["answers"]
    assert main(["stats", str(path)]) == 0
    assert "8 records, 3 of them not counted" in capsys.readouterr().out


def test_long_texts_that_differ_only_at_the_end_count_separately(data):
    start = "x" * LONGEST_TEXT
    found = counted(
        data([asked("a.png", f"{start} one"), asked("a.png", f"{start} two"), asked("b.png", f"{start} one")])
    )
    assert sorted(found.counts["answers"].values()) == [1, 2]


def test_the_command_prints_tables_plots_and_json(data, tmp_path, capsys):
    path, page = str(data(RECORDS)), tmp_path / "deep" / "stats.html"
    assert main(["stats", path, "--out", str(page), "--show", "2"]) == 0
    out = capsys.readouterr().out
    assert "kinds of objects: 4, 2 distinct" in out
    assert re.search(r"^ +2 +40\.0%  A red cat\.$", out, flags=re.MULTILINE)
    assert "... and 2 more" in out
    assert main(["stats", path, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["measures"]["images"] | {"histogram": 0} == {
        "count": 5,
        "sum": 5,
        "mean": 1,
        "quantiles": {"least": 0, "median": 1, "95%": 1, "most": 2},
        "histogram": 0,
    }
    assert [bar["count"] for bar in printed["measures"]["images"]["histogram"]] == [1, 3, 1]
    assert printed["counts"]["answers"]["most_common_share"] == 0.4
    text = page.read_text()
    sections = dict(re.findall(r'data-(?:measure|count)="([^"]+)">(.*?)</section>', text, flags=re.DOTALL))
    assert re.findall(r'data-count="(\d+)"', sections["images per record"]) == ["1", "3", "1"]
    assert re.findall(r'<td class="n">(\d+)</td>', sections["kinds of objects"]) == ["3", "1"]
    assert "<script" not in text
    assert not re.findall(r"(?:src|href)=", text)


def test_bars_are_as_high_as_their_counts(data, tmp_path):
    page = tmp_path / "stats.html"
    assert main(["stats", str(data(RECORDS)), "--out", str(page)]) == 0
    chart = re.search(r'data-measure="images per record">(.*?)</section>', page.read_text(), flags=re.DOTALL)[1]
    heights = [float(height) for height in re.findall(r'<rect[^>]* height="([\d.]+)"', chart)]
    assert [height / max(heights) for height in heights] == pytest.approx([1 / 3, 1, 1 / 3], abs=1e-3)


def test_validation_data_is_counted_on_request(data):
    train, val = data(RECORDS, "t.jsonl"), data(RECORDS[:2], "v.jsonl")
    assert counted(train, "--val_jsonl", str(val), split="val").records == 2
    with pytest.raises(RecipeError, match="split val"):
        counted(train, split="val")


def test_quantiles_are_values_and_a_histogram_keeps_all():
    assert quantiles([5, 1, 9, 3]) == {"least": 1, "median": 3, "95%": 5, "most": 9}
    values = [value % 97 for value in range(1000)]
    bars = histogram(values)
    assert sum(count for _, _, count in bars) == 1000
    for low, high, count in bars:
        assert count == sum(low <= value < high for value in values)
    assert Counter(high - low for low, high, _ in bars).most_common(1)[0][1] == len(bars)


def test_tokens_of_dense_captions_are_those_of_the_groups_that_training_draws(tiny_dir, tmp_path):
    data = write_dense(tmp_path / "data", 11)
    recipe = load_recipe(None, dense_settings(tiny_dir, data, tmp_path / "run", "data.images_per_user_turn=2"))
    found = count_recipe(recipe, quiet=True)
    dataset, _ = build_datasets(recipe, build_processor(recipe), recipe.training.arguments["seed"])
    samples = [dataset[k] for k in range(len(dataset))]
    assert (found.records, len(found.numbers["tokens"])) == (11, 6)
    assert sorted(found.numbers["tokens"]) == sorted(len(sample["input_ids"]) for sample in samples)
    assert sorted(found.numbers["learned"]) == sorted(int((sample["labels"] >= 0).sum()) for sample in samples)
    recipe.template.max_length = min(found.numbers["tokens"])
    assert count_recipe(recipe, quiet=True).numbers["tokens"] == found.numbers["tokens"], "too long is counted too"
    (tmp_path / "data" / "3.png").unlink()
    broken = count_recipe(recipe, quiet=True)
    assert (broken.unread, len(broken.numbers["tokens"])) == (1, 5)
