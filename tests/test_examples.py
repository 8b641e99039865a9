"""The code in the README, the examples and the notebook runs exactly as shown."""

import json
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "examples").rglob("*.ipynb"))
SHOWN = {
    "collator": ("A red circle.<|im_end|>", "background: #9be29b"),
    "own_script": ("trainable params:", "adapter_model.safetensors", "pixel_values"),
}
"""Notebook -> texts in its outputs."""
GUIDES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    subprocess.run([sys.executable, ROOT / "examples/digits/make_digits.py", folder], check=True)
    return folder


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_digits_are_split_in_file_order_and_drawn_unchanged(digits):
    from sklearn.datasets import load_digits

    train, val = lines(digits / "train.jsonl"), lines(digits / "val.jsonl")
    assert (len(train), len(val)) == (15_000, 297)
    varied = [record for record in train if "-" in record["image"]]
    train = [record for record in train if "-" not in record["image"]]
    names = [{record["image"][7:11] for record in part} for part in (varied, train)]
    assert names[0] == names[1], "a held-out digit was augmented"
    answers = [int(record["conversations"][-1]["value"]) for record in train + val]
    assert answers == load_digits().target.tolist()
    for index in (0, 1499, 1500, 1796):
        image = Image.open(digits / (train + val)[index]["image"])
        assert image.size == (64, 64)
        shrunk = np.asarray(image.resize((8, 8), Image.Resampling.BOX), dtype=float) / 255 * 16
        assert np.corrcoef(shrunk.ravel(), load_digits().images[index].ravel())[0, 1] > 0.95


def test_digits_are_the_same_bytes_every_time(digits, tmp_path):
    subprocess.run([sys.executable, ROOT / "examples/digits/make_digits.py", tmp_path], check=True)
    for name in ("train.jsonl", "val.jsonl", "images/0000.png", "images/1796.png"):
        assert (tmp_path / name).read_bytes() == (digits / name).read_bytes()
    assert len(list(tmp_path.glob("images/*.png"))) == 1797 + 9 * 1500


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_to_its_end_and_is_stored_without_outputs(path, tmp_path, monkeypatch):
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path))
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    assert all(cell.execution_count for cell in code)
    shown = json.dumps([cell.outputs for cell in code])
    assert all(text in shown for text in SHOWN[path.stem])


def test_the_tour_of_the_readme_runs(tiny_dir, tmp_path, monkeypatch):
    """Uses a tiny checkpoint and two steps instead of Qwen3-VL-4B and an epoch."""
    (tour,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    record = {
        "image": "cat.png",
        "conversations": [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A cat."}],
    }
    photos = tmp_path / "photos"
    photos.mkdir()
    Image.new("RGB", (96, 64), "orange").save(photos / "cat.png")
    (photos / "train.jsonl").write_text((json.dumps(record) + "\n") * 4)
    short = ["training.max_steps=2", "training.report_to=none", f"training.output_dir={tmp_path / 'out'}"]
    for old, new in (
        ('"Qwen/Qwen3-VL-4B-Instruct"', repr(str(tiny_dir))),
        ('"data.train=photos/train.jsonl"]', f'"data.train=photos/train.jsonl", *{short!r}]'),
    ):
        assert old in tour
        tour = tour.replace(old, new)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(tour, "README.md", "exec"), names)
    assert names["result"].steps == 2
    assert (names["result"].output_dir / "adapter_config.json").is_file()
    assert names["batch"]["input_ids"].shape[1] == 2 * names["encoder"].length(record, media_root="photos")
    assert names["loss"].isfinite()


def test_every_link_in_the_guides_leads_somewhere():
    broken = [
        f"{guide.name}: {target}"
        for guide in GUIDES
        for target in re.findall(r"\]\(([^)#:]+)\)", guide.read_text())
        if not (guide.parent / target).exists()
    ]
    assert not broken
    assert sum(len(re.findall(r"\]\(", guide.read_text())) for guide in GUIDES) > 10


def test_every_json_record_in_the_guides_is_read(tmp_path):
    from qwenvl_ft.data.conversation import Source
    from qwenvl_ft.data.readers import read_record

    records = [
        json.loads(block)
        for guide in GUIDES
        for block in re.findall(r"```json\n(.*?)```", guide.read_text(), flags=re.DOTALL)
    ]
    assert len(records) >= 3
    for record in records:
        if "annotations" in record:  # a COCO file, not a record
            continue
        named = record["images"] if "images" in record else []
        for name in filter(lambda image: isinstance(image, str), named):  # some formats read the image size
            Image.new("RGB", (640, 640)).save(tmp_path / Path(name).name)
        conversation = read_record(record, Source("guide", "guide"), str(tmp_path))
        assert conversation.messages[-1].role == "assistant"


def test_make_help_lists_the_targets():
    help_text = subprocess.run(["make", "-C", ROOT, "help"], check=True, capture_output=True, text=True).stdout
    for target in ("setup", "demo", "test", "check", "help"):
        assert re.search(rf"^{target}\s", help_text, flags=re.MULTILINE)
