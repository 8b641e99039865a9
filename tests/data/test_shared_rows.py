"""Ranks that train a row together have the whole row's tokens, and each frame's pixels exactly once."""

import pickle

import numpy as np
import pytest
import torch
from accelerate import skip_first_batches
from cases import ListRecords, picture

from qwenvl_ft.data.collate import QwenVLCollator, vision_fillers
from qwenvl_ft.data.conversation import IGNORE
from qwenvl_ft.data.encode.encoder import Encoder
from qwenvl_ft.data.plan.costs import CostModel
from qwenvl_ft.data.plan.dataset import SampleDataset
from qwenvl_ft.data.plan.packing import RunShape
from qwenvl_ft.data.plan.sampler import EpochLoader, PlanSampler
from qwenvl_ft.data.share import Share
from qwenvl_ft.errors import DataError
from qwenvl_ft.model.placed_media import MediaPlaces
from qwenvl_ft.upstream.vision_tables import frame_tables

COSTS = CostModel()
ROW_KEYS = ("input_ids", "labels", "position_ids", "label_weights")
KINDS = {"image": "pixel_values", "video": "pixel_values_videos"}


def turns(text, answer="Yes, it is.", **more):
    return {"conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": answer, **more}]}


def rows_of(mixed_records, films=None):
    """Return name -> records that share a row."""
    sized = {"image": picture(200, 130, 4), "max_pixels": 64 * 64} | turns("<image>What?")
    plain, weighted = {"image": picture(90, 140, 5)} | turns("<image>What?"), turns("Hello there.", loss_weight=2.0)
    frames = [picture(64, 96, seed) for seed in range(7)]
    rows = {
        "mixed": [*mixed_records, sized, plain, weighted],
        "one image": [plain, turns("Say a word."), turns("And another one.")],
        "text": [turns("Say a word."), turns("And another one.")],
        "odd video": [{"video": [frames], **turns("<video>What moves?")}],
    }
    if films:
        rows["film"] = [{"video": films["odd"], **turns("<video>What moves?")}]
    return rows


def made(processor, records, tmp_path, *, raw=False, **options):
    encoder = Encoder(processor, raw_pixels=raw)
    return SampleDataset(ListRecords(records), encoder, cache_dir=tmp_path, **options)


def collated(dataset, samples, share=None):
    processor = dataset.encoder.processor
    fillers = vision_fillers(processor, ("image", "video"), raw_pixels=dataset.encoder.raw_pixels)
    ids = processor.tokenizer.convert_tokens_to_ids(["<|image_pad|>", "<|video_pad|>"])
    return QwenVLCollator(fillers, MediaPlaces(tuple(ids), frame_tables(2, 48)), share)(samples)


def batches(dataset, size):
    """Return the batch of the whole row, and that of each rank of a group, as a worker makes it."""
    pad = dataset.encoder.processor.tokenizer.pad_token_id
    tickets = [dataset.ticket(0, index) for index in range(len(dataset))]
    whole = collated(dataset, dataset.__getitems__(tickets))
    shares = [Share(size, place, pad, COSTS) for place in range(size)]
    copies = [pickle.loads(pickle.dumps(dataset.shared(share))) for share in shares]
    return whole, [collated(data, data.__getitems__(tickets), data.share) for data in copies]


def split(tensor, sizes):
    return [] if tensor is None else list(tensor.split(sizes))


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("raw", [False, True], ids=["processed", "raw"])
@pytest.mark.parametrize("name", ["mixed", "one image", "text", "odd video", "film"])
def test_the_shares_together_are_the_row(processor, mixed_records, films, tmp_path, name, raw, size):
    dataset = made(processor, rows_of(mixed_records, films)[name], tmp_path, raw=raw)
    whole, parts = batches(dataset, size)
    length = whole["input_ids"].shape[1]
    for place, part in enumerate(parts):
        assert part["input_ids"].shape[1] == length + -length % size
        for key in ROW_KEYS:
            assert (key in part) == (key in whole)
            assert key not in whole or torch.equal(part[key][..., :length], whole[key]), key
        assert (part["labels"][:, length:] == IGNORE).all()
        borders = whole["cu_seq_lens_q"].tolist() + ([length + -length % size] if length % size else [])
        assert part["cu_seq_lens_q"].tolist() == borders
        assert [str(source) for source in part["sources"]] == [str(source) for source in whole["sources"]]
        for kind, pixels in KINDS.items():
            every = [(1, h, w) for t, h, w in whole[f"{kind}_grid_thw"].tolist() for _ in range(t)]
            owners, tokens = part[f"{kind}_owners"], part[f"{kind}_tokens"]
            assert torch.equal(owners, parts[0][f"{kind}_owners"])
            assert tokens.tolist() == [h * w // 4 for _, h, w in every]
            assert torch.equal(part[f"{kind}_places"], whole[f"{kind}_places"])
            assert int(tokens.sum()) == len(part[f"{kind}_places"])
            own = [frame for frame, owner in zip(every, owners.tolist(), strict=True) if owner == place]
            grids = part[f"{kind}_grid_thw"].tolist()
            assert grids == ([list(frame) for frame in own] or [[1, 2, 2]]), "own frames, or a filler's"
            sizes = [h * w for _, h, w in grids]
            assert part[f"{kind}_cu_seqlens"].tolist() == [0, *np.cumsum(sizes)]
            assert part[f"{kind}_max_seqlen"] == max(sizes)
            frames = split(whole[pixels], [h * w for _, h, w in every])
            wanted = [frame for frame, owner in zip(frames, owners.tolist(), strict=True) if owner == place]
            assert part[pixels].dtype == whole[pixels].dtype
            assert torch.equal(part[pixels], torch.cat(wanted) if wanted else torch.zeros_like(part[pixels]))
            table = split(whole[f"{kind}_interp_weights"], [h * w for _, h, w in every])
            wanted = [frame for frame, owner in zip(table, owners.tolist(), strict=True) if owner == place]
            assert not wanted or torch.equal(part[f"{kind}_interp_weights"], torch.cat(wanted))


def test_frames_are_dealt_out_by_cost_and_alike_on_every_rank():
    rng = np.random.default_rng(0)
    for size in (2, 4, 8):
        for frames in (3 * size, 20 * size):
            patches = rng.integers(16, 4096, frames).tolist()
            owners = [Share(size, place, 0, COSTS).deal(patches) for place in range(size)]
            assert all(np.array_equal(owners[0], other) for other in owners)
            costs = COSTS.of(np.zeros(frames), patches)
            loads = np.bincount(owners[0], weights=costs, minlength=size)
            assert loads.max() / loads.mean() < (1.25 if frames == 3 * size else 1.03)
            in_turn = np.bincount(np.arange(frames) % size, weights=costs)
            assert loads.max() <= in_turn.max(), "no better than dealing in turn"
    assert sorted(Share(4, 0, 0, COSTS).deal([256] * 4)) == [0, 1, 2, 3]
    assert Share(4, 0, 0, COSTS).deal([]).size == 0
    assert np.bincount(Share(2, 0, 0, CostModel(0, 0, 0)).deal([256] * 4)).tolist() == [2, 2], "also without costs"


def test_no_pixel_of_another_rank_is_decoded(processor, mixed_records, films, tmp_path, monkeypatch):
    from qwenvl_ft.data.encode import pixels
    from qwenvl_ft.data.media import video

    records = [*rows_of(mixed_records)["mixed"], {"video": films["odd"], **turns("<video>What moves?")}]
    dataset = made(processor, records, tmp_path)
    opened, resized = [], []
    for module in (pixels, video):
        plain = module.open_image
        monkeypatch.setattr(module, "open_image", lambda *a, plain=plain: opened.append(1) or plain(*a))
    plain_resize = video.resized
    monkeypatch.setattr(video, "resized", lambda *a: resized.append(1) or plain_resize(*a))
    dataset.__getitems__([dataset.ticket(0, k) for k in range(len(dataset))])
    images, frames = len(opened), len(resized)
    assert images > 10, "vacuous"
    assert frames > 15, "vacuous"
    pad, counts = processor.tokenizer.pad_token_id, []
    for place in range(3):
        opened.clear(), resized.clear()
        shared = dataset.shared(Share(3, place, pad, COSTS))
        shared.__getitems__([dataset.ticket(0, k) for k in range(len(dataset))])
        counts.append((len(opened), len(resized)))
    assert tuple(map(sum, zip(*counts, strict=True))) == (images, frames)
    assert all(0 < few < images and 0 < less < frames for few, less in counts)


def damaged(tmp_path, count=4):
    """Return records with an image file each, of which the third has a whole header and half of its pixels."""
    paths = [tmp_path / f"{k}.png" for k in range(count)]
    for k, path in enumerate(paths):
        picture(96, 64, k).save(path)
    records = [{"image": str(path)} | turns("<image>What?", f"Answer {k}.") for k, path in enumerate(paths)]
    return paths, records


def test_a_damaged_image_is_found_by_its_owner_and_changes_no_token(processor, tmp_path):
    paths, records = damaged(tmp_path)
    dataset = made(processor, records, tmp_path, on_error="skip")
    before = batches(dataset, 2)[1]
    paths[2].write_bytes(paths[2].read_bytes()[:-200])
    _, parts = batches(dataset, 2)
    owner = int(parts[0]["image_owners"][2])
    for place, part in enumerate(parts):
        assert torch.equal(part["input_ids"], before[place]["input_ids"])
        assert torch.equal(part["image_grid_thw"], before[place]["image_grid_thw"])
        assert part["pixel_values"].shape == before[place]["pixel_values"].shape
        assert part["check"].digests == before[place]["check"].digests
        assert ("faults" in part) == bool(part["check"].faults) == (place == owner)
    assert "2.png is damaged" in parts[owner]["check"].faults[2]
    kept = [frame for frame, place in enumerate(parts[0]["image_owners"].tolist()) if place == owner]
    frames = parts[owner]["pixel_values"].chunk(len(kept))
    assert [bool(frame.any()) for frame in frames] == [frame != 2 for frame in kept], "only the damaged one is blank"


def test_a_record_that_cannot_be_read_keeps_its_planned_length(processor, tmp_path):
    paths, records = damaged(tmp_path)
    dataset = made(processor, records, tmp_path, on_error="skip")
    before = batches(dataset, 2)[1]
    paths[1].unlink()
    tickets = [dataset.ticket(0, k) for k in range(4)]
    part = collated(dataset, dataset.shared(Share(2, 0, 0, COSTS)).__getitems__(tickets), Share(2, 0, 0, COSTS))
    begin, end = part["cu_seq_lens_q"][1:3].tolist()
    assert part["input_ids"].shape == before[0]["input_ids"].shape
    assert (part["labels"][0, begin:end] == IGNORE).all()
    assert len(part["image_owners"]) == 3
    assert part["check"].digests[0] == before[0]["check"].digests[0]
    assert part["check"].digests[1] != before[0]["check"].digests[1]
    dataset.on_error = "raise"
    with pytest.raises(DataError, match=r"list\[1\]: image .*1.png"):
        dataset.shared(Share(2, 0, 0, COSTS)).__getitems__(tickets)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_group_gets_the_same_rows_also_after_a_resume(processor, mixed_records, tmp_path, workers):
    dataset = made(processor, mixed_records * 3, tmp_path)
    fillers = vision_fillers(processor, ("image", "video"))

    def rows(process, skip=0):
        """The samples of each batch of one of four processes, two of which share a row."""
        sampler = PlanSampler(dataset, RunShape(2, 1, 1, 2), rank=process // 2, max_length=160, seed=3)
        share = Share(2, process % 2, processor.tokenizer.pad_token_id, COSTS)
        collator = QwenVLCollator(fillers, share=share)
        loader = EpochLoader(dataset.shared(share), sampler, collator, num_workers=workers)
        return [[str(source) for source in batch["sources"]] for batch in skip_first_batches(loader, skip)]

    first, second, third, fourth = (rows(process) for process in range(4))
    assert first == second
    assert third == fourth
    assert first != third
    assert {name for batch in first + third for name in batch} == {f"list[{k}]" for k in range(15)}
    assert rows(1, skip=2) == first[2:]
    assert len(first) > 2, "vacuous"
