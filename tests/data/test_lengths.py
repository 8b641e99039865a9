"""The planned length equals the encoded length, and comes from headers alone."""

import io
import json
import multiprocessing
import os
import shutil
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
import xxhash
from cases import ListRecords, picture
from PIL import Image, ImageFile
from tokenizers import normalizers, pre_tokenizers

from qwenvl_ft.data.encode.draft import TooLong
from qwenvl_ft.data.encode.encoder import Encoder
from qwenvl_ft.data.media.images import MediaPolicy
from qwenvl_ft.data.plan import lengths as lengths_module
from qwenvl_ft.data.plan.dataset import Planned, SampleDataset
from qwenvl_ft.data.plan.lengths import UNSUPERVISED, measure
from qwenvl_ft.data.plan.packing import RunShape
from qwenvl_ft.data.plan.sampler import PlanSampler
from qwenvl_ft.errors import DataError
from qwenvl_ft.model.load import load_processor

WORDS = [
    "box",
    "Größe",
    "图像",
    "картина",
    "صورة",
    "🙂",
    "x=1.5;",
    "\n",
    "  ",
    "<|box_start|>(1,2)<|box_end|>",
    "naïve",
    "e\u0301",
]


def encoded(image, kind):
    """Return the bytes of a file of that format."""
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def random_record(rng):
    """Several languages and turns; no to three images of any size, aspect ratio and format."""
    images, turns = [], []
    for turn in range(rng.integers(1, 4)):
        text = " ".join(rng.choice(WORDS, rng.integers(1, 30)))
        for _ in range(rng.integers(0, 2 if turn else 3)):
            width, height = (int(x) for x in np.exp(rng.uniform(np.log(8), np.log(300), 2)))
            image = Image.new("RGB", (width, height), tuple(int(x) for x in rng.integers(0, 256, 3)))
            images.append(encoded(image, str(rng.choice(["PNG", "JPEG", "WEBP"]))))
            text = f"<image>\n{text}" if rng.random() < 0.5 else f"{text} <image>"
        turns += [{"from": "human", "value": text}, {"from": "gpt", "value": " ".join(rng.choice(WORDS, 5))}]
    return {"image": images, "conversations": turns}


def test_planned_lengths_equal_encoded_lengths_of_2000_random_records(processor):
    rng = np.random.default_rng(0)
    encoder = Encoder(processor)
    widths = set()
    for _ in range(2_000):
        record = random_record(rng)
        sample = encoder(record)
        draft, extent = encoder.draft(encoder.conversation(record)), encoder.extent(encoder.conversation(record))
        assert extent == (draft.length, draft.patches, bool(draft.videos), 0, 0, ())
        assert extent.tokens == len(sample["input_ids"])
        widths.update(map(tuple, sample["image_grid_thw"].tolist()) if "image_grid_thw" in sample else [])
    assert len(widths) > 50, "vacuous: all images have one size"


def test_no_pixel_is_decoded(processor, monkeypatch):
    rng = np.random.default_rng(1)
    records = [random_record(rng) for _ in range(50)]
    encoder = Encoder(processor)
    expected = [len(encoder(record)["input_ids"]) for record in records]

    def refuse(self):
        raise AssertionError("a pixel was decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", refuse)
    assert [encoder.length(record) for record in records] == expected
    with pytest.raises(AssertionError, match="a pixel was decoded"):
        encoder(next(record for record in records if record["image"]))


def turn(text, answer="yes"):
    return {"conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": answer}]}


def test_dropped_records_are_counted_by_reason(processor, tmp_path):
    records = [turn("short"), turn("long " * 200), {"messages": [{"role": "user", "content": "no answer"}]}, turn("b")]
    encoder = Encoder(processor, max_length=64, truncation_strategy="delete")
    dataset = SampleDataset(ListRecords(records), encoder, cache_dir=tmp_path, name="mine")
    assert len(dataset) == 2
    assert dataset.at(0).measured.dropped() == {"longer than template.max_length": 1, "no supervised token": 1}
    assert "left out: 1 longer than template.max_length, 1 no supervised token" in dataset.summary()
    assert dataset[1]["source"].record == "list[3]"


def test_with_raise_a_long_record_stops_the_run(processor, tmp_path):
    encoder = Encoder(processor, max_length=64, truncation_strategy="raise")
    with pytest.raises(TooLong, match=r"list\[1\]"):
        SampleDataset(ListRecords([turn("a"), turn("long " * 200)]), encoder, cache_dir=tmp_path)


def test_nothing_usable_is_an_error(processor, tmp_path):
    encoder = Encoder(processor, max_length=64, truncation_strategy="delete")
    with pytest.raises(DataError, match=r"mine: no record can be used \(1 longer than template.max_length\)"):
        SampleDataset(ListRecords([turn("long " * 200)]), encoder, cache_dir=tmp_path, name="mine")


def test_a_second_start_reads_the_cache(processor, tmp_path, monkeypatch):
    records = ListRecords([turn("a" * k) for k in range(1, 20)])
    first = measure(records, Encoder(processor), cache_dir=tmp_path)
    monkeypatch.setattr(lengths_module, "_measure", lambda *_: pytest.fail("measured again"))
    again = measure(records, Encoder(processor), cache_dir=tmp_path)
    assert again.tokens.tolist() == first.tokens.tolist()
    with pytest.raises(pytest.fail.Exception):
        measure(records, Encoder(processor, system_prompt="other"), cache_dir=tmp_path)


def test_workers_measure_the_same(processor, tmp_path, monkeypatch):
    monkeypatch.setattr(lengths_module, "PARALLEL_FROM", 1)
    records = ListRecords([turn("word " * (k % 40 + 1)) for k in range(600)])
    state = torch.get_rng_state()
    parallel = measure(records, Encoder(processor), num_proc=2, cache_dir=tmp_path / "a")
    assert torch.equal(torch.get_rng_state(), state), "measuring must not draw from the global generator"
    alone = measure(records, Encoder(processor), num_proc=1, cache_dir=tmp_path / "b")
    assert parallel.tokens.tolist() == alone.tokens.tolist()
    assert len(set(alone.tokens.tolist())) > 10


def test_a_medium_that_changed_after_planning_is_named(processor, tmp_path):
    path = tmp_path / "a.png"
    picture(64, 64).save(path)
    records = ListRecords([{"image": str(path)} | turn("<image>")])
    dataset = SampleDataset(records, Encoder(processor), cache_dir=tmp_path)
    dataset[0]
    picture(256, 64).save(path)
    with pytest.raises(DataError, match=r"list\[0\]: planned with \d+ tokens, encoded to \d+"):
        dataset[0]


def test_a_changed_medium_is_measured_anew_at_the_next_start(processor, tmp_path, monkeypatch):
    """Also one whose record was dropped as too long, and a video frame. Unchanged media are read from the cache."""
    image, frame = tmp_path / "a.png", tmp_path / "frame.png"
    picture(256, 256).save(image)
    picture(64, 64).save(frame)
    records = ListRecords(
        [{"image": str(image)} | turn("<image>"), {"video": [[str(frame), str(frame)]]} | turn("<video>")]
    )
    encoder = Encoder(processor, max_length=60, truncation_strategy="delete")
    start = lambda: measure(records, encoder, cache_dir=tmp_path)  # noqa: E731
    assert start().kept.tolist() == [1]
    picture(64, 64).save(image)
    shrunk = start()
    assert shrunk.kept.tolist() == [0, 1]
    assert shrunk.tokens[0] == len(encoder(records[0][0])["input_ids"])
    with monkeypatch.context() as patch:
        patch.setattr(lengths_module, "_measure", lambda *_: pytest.fail("measured again"))
        assert start().kept.tolist() == [0, 1]
    picture(128, 128).save(frame)
    assert start().tokens[1] == encoder.length(records[1][0]) != shrunk.tokens[1]
    frame.unlink()
    with pytest.raises(DataError, match=r"list\[1\]: image .*frame.png does not exist"):
        start()


def test_another_media_policy_is_measured_anew(processor, tmp_path):
    records = ListRecords([{"image": picture(64, 64)} | turn("<image>")])
    measure(records, Encoder(processor), cache_dir=tmp_path)
    with pytest.raises(DataError, match=r"64 x 64 = 4096 pixels, above data.max_image_pixels=100"):
        measure(records, Encoder(processor, policy=MediaPolicy(max_image_pixels=100)), cache_dir=tmp_path)


def test_another_tokenizer_is_measured_anew(tiny_dir, tmp_path):
    """Recognised by its file and by changes after loading; a copy of the file is the same tokenizer."""
    tokenizer = json.loads((tiny_dir / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer["model"]["merges"].pop()
    changed = shutil.copytree(tiny_dir, tmp_path / "changed")
    (changed / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")

    def key(folder, **changes):
        processor = load_processor(str(folder))
        if "added" in changes:
            processor.tokenizer.add_tokens(changes.pop("added"))
        for name, value in changes.items():
            setattr(
                processor.tokenizer if name == "name_or_path" else processor.tokenizer.backend_tokenizer, name, value
            )
        return Encoder(processor).fingerprint()

    plain = key(tiny_dir)
    assert key(shutil.copytree(tiny_dir, tmp_path / "copy")) == plain
    others = [
        key(changed),
        key(tiny_dir, name_or_path=""),
        key(changed, name_or_path=""),
        key(tiny_dir, added=["qwerty"]),
        key(tiny_dir, normalizer=normalizers.NFKC()),
        key(tiny_dir, pre_tokenizer=pre_tokenizers.ByteLevel()),
    ]
    assert len({plain, *others}) == 1 + len(others)


def test_truncation_is_counted(processor, encoder, tmp_path):
    record = {"image": [picture(64, 64), picture(64, 64)]} | turn("a <image>", "b")
    record["conversations"] += turn("c <image>", "d " * 30)["conversations"]
    records = ListRecords([record, turn("short")])
    full = encoder.length(record)
    left = Encoder(processor, max_length=full - 3, truncation_strategy="left")
    dataset = SampleDataset(records, left, cache_dir=tmp_path, name="mine")
    kept = len(dataset[0]["input_ids"])
    assert dataset.at(0).measured.cut() == (1, full - kept, 0)
    assert dataset.summary().endswith(f"; cut: 1 samples, by {full - kept:,} tokens")
    shorter = Encoder(processor, max_length=full - 10, truncation_strategy="left")
    dataset = SampleDataset(records, shorter, cache_dir=tmp_path, name="mine")
    assert len(dataset[0]["image_grid_thw"]) == 1
    assert dataset.at(0).measured.cut() == (1, full - len(dataset[0]["input_ids"]), 1)
    assert dataset.summary().endswith("tokens and 1 media")


@pytest.fixture(scope="module")
def dataset(processor, tmp_path_factory):
    records = ListRecords([turn("word " * (k % 13 + 1), "x " * (k % 5 + 1)) for k in range(60)])
    return SampleDataset(records, Encoder(processor), cache_dir=tmp_path_factory.mktemp("lengths"))


def test_all_ranks_together_see_every_sample_once_an_epoch(dataset):
    samplers = [PlanSampler(dataset, RunShape(2, 1, 2), rank=rank, max_length=100, seed=5) for rank in (0, 1)]
    orders = []
    for epoch in range(2):
        for sampler in samplers:
            sampler.set_epoch(epoch)
        assert len({len(sampler) for sampler in samplers}) == 1
        seen = [t.place for sampler in samplers for batch in sampler for t in batch if not t.filler]
        assert sorted(seen) == list(range(60))
        orders.append(seen)
    assert orders[0] != orders[1]


def test_a_filler_is_the_sample_without_labels(dataset):
    sample, filler = dataset[7], dataset[~7]
    assert torch.equal(sample["input_ids"], filler["input_ids"])
    assert (sample["labels"] >= 0).any()
    assert not (filler["labels"] >= 0).any()


def test_planning_a_million_samples_is_a_matter_of_seconds():
    """Prints the time; asserts only that the plan is complete and its rows are full."""
    from qwenvl_ft.data.plan.packing import fill, pack_lengths

    sizes = np.clip(np.random.default_rng(0).lognormal(6, 0.8, 1_000_000).astype(int), 1, 8192)
    start = time.process_time()
    rows = pack_lengths(sizes, max_length=8192, seed=1)
    print(f"1,000,000 lengths in {time.process_time() - start:.2f} s, {fill(rows, sizes, 8192):.2%} full")
    assert np.array_equal(np.sort(np.concatenate(rows)), np.arange(1_000_000))
    assert fill(rows, sizes, 8192) >= 0.98


class LoggedRecords(ListRecords):
    """Logs the process that reads a record."""

    def __init__(self, records, log):
        super().__init__(records)
        self.log = log

    def __getitem__(self, index):
        with self.log.open("a") as file:
            file.write(f"{os.getpid()}\n")
        return super().__getitem__(index)


def test_of_processes_that_start_together_one_measures_and_the_others_read_its_file(processor, tmp_path):
    records = LoggedRecords([turn("a" * (k % 9 + 1)) for k in range(200)], tmp_path / "log")
    encoder, context = Encoder(processor), multiprocessing.get_context("fork")
    start, results = context.Barrier(3), context.Queue()

    def run(folder):
        start.wait(60)
        results.put(measure(records, encoder, cache_dir=folder).tokens.tolist())

    for folders, measured in (["shared"] * 3, 1), (["a", "b", "c"], 3):
        records.log.write_text("")
        ranks = [context.Process(target=run, args=(tmp_path / folder,)) for folder in folders]
        for rank in ranks:
            rank.start()
        lengths = [results.get(timeout=60) for _ in ranks]
        for rank in ranks:
            rank.join(60)
        assert lengths[0] == lengths[1] == lengths[2]
        read = records.log.read_text().split()
        assert (len(set(read)), len(read)) == (measured, measured * 200), "with folders of their own each measures"


def test_a_url_that_could_not_be_reached_is_tried_again(processor, tmp_path, monkeypatch):
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A box."}]
    records = ListRecords([{"image": "http://127.0.0.1:9/a.png", "conversations": turns}])
    encoder = Encoder(processor, policy=MediaPolicy(allow_urls=True))
    for _ in range(2):
        assert measure(records, encoder, cache_dir=tmp_path, on_error="skip").dropped() == {"that cannot be read": 1}
    monkeypatch.setattr("qwenvl_ft.data.media.opening._fetch", lambda url, policy: encoded(picture(64, 64), "PNG"))
    assert measure(records, encoder, cache_dir=tmp_path, on_error="skip").dropped() == {}
    monkeypatch.undo()
    assert measure(records, encoder, cache_dir=tmp_path, on_error="skip").dropped() == {}, "measured once, it is cached"


def test_the_plans_key_changes_with_everything_that_the_plan_depends_on(dataset):
    measured = dataset.at(0).measured
    key = Planned(measured).key()
    assert key.samples == 60
    assert key.lengths == xxhash.xxh64(dataset.lengths.astype("<i8").tobytes()).hexdigest(), "as in saved checkpoints"
    assert Planned(replace(measured, faults=("other",))).key() == key
    for column in ("tokens", "patches", "has_video"):
        changed = getattr(measured, column).copy()
        changed[7] = not changed[7] if column == "has_video" else changed[7] + 1
        other = Planned(replace(measured, **{column: changed})).key()
        assert other.columns != key.columns
        assert (other.lengths != key.lengths) == (column == "tokens")
    status = measured.status.copy()
    status[7] = UNSUPERVISED
    assert Planned(replace(measured, status=status)).key().samples == 59
