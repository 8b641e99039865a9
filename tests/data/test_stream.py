"""A stream's windows hold every record once a round, in an order of the seed, and any of them can be read again."""

import io
import json
import pickle
import tarfile
from itertools import chain

import numpy as np
import pytest
import stream_memory
import torch
from stream_cases import WINDOW, open_stream, served, turns, write_jsonl, write_parquet, write_shards, write_tar

from qwenvl_ft.data.encode.encoder import Encoder
from qwenvl_ft.data.plan.dataset import SampleDataset, Totals
from qwenvl_ft.data.plan.packing import RunShape
from qwenvl_ft.data.plan.sampler import PlanSampler
from qwenvl_ft.data.plan.windows import Begin, Saved
from qwenvl_ft.data.sources.records import load_records
from qwenvl_ft.data.sources.stream import ORDER
from qwenvl_ft.errors import DataError


def record_ids(dataset, window):
    """Return the ids of a window's records, read and not read."""
    conversations = dataset.windows.held[window].epochs
    return [conversations.raw(window, place)[0][1].id for place in range(len(conversations))]


def all_windows(dataset):
    """Return the ids of the records of each window, to the end of the stream."""
    found = [record_ids(dataset, dataset.first)] if len(dataset.at(dataset.first)) else []
    while len(dataset.at(dataset.first + len(found))):
        found.append(record_ids(dataset, dataset.first + len(found)))
    return found


def ids_of(path):
    with tarfile.open(path) as tar:
        return [f"r{int(member.name[:6])}" for member in tar if member.name.endswith(".json")]


@pytest.fixture(scope="module")
def web(tmp_path_factory):
    folder = tmp_path_factory.mktemp("web")
    write_shards(folder)
    return folder


def test_every_record_is_in_one_window_of_each_round(web, encoder, tmp_path):
    """The reference reads the tars itself and draws the order of the shards with numpy."""
    dataset = open_stream(str(web / "*.tar"), tmp_path, encoder)
    windows = all_windows(dataset)
    shards = sorted(web.glob("*.tar"))
    expected = []
    for number in range(2):
        order = np.random.default_rng([ORDER, 3, number]).permutation(len(shards))
        records = [record for place in order for record in ids_of(shards[place])]
        expected += [records[begin : begin + WINDOW] for begin in range(0, len(records), WINDOW)]
    assert windows == expected
    half = len(windows) // 2
    rounds = [list(chain(*windows[:half])), list(chain(*windows[half:]))]
    assert sorted(rounds[0]) == sorted(rounds[1]) == sorted(record for path in shards for record in ids_of(path))
    assert rounds[0] != rounds[1], "both rounds have the same order"


def test_another_seed_gives_another_order(web, encoder, tmp_path):
    first, second = (
        all_windows(open_stream(str(web / "*.tar"), tmp_path / str(seed), encoder, rounds=1, seed=seed))
        for seed in (3, 4)
    )
    assert first != second


@pytest.mark.parametrize("write", [write_tar, write_parquet, write_jsonl])
def test_a_sample_of_a_shard_is_that_of_the_local_file(write, encoder, tmp_path):
    """Records, media and lengths are those that the ordinary way reads from the same file."""
    ending = write.__name__.removeprefix("write_")
    [name] = write_shards(tmp_path / "web", shards=1, write=write, ending=ending)
    with served(tmp_path / "web") as server:
        dataset = open_stream(server.url(name), tmp_path / "cache", encoder, window=100)
    local = SampleDataset(load_records(str(tmp_path / "web" / name)), encoder, cache_dir=tmp_path / "lengths")
    assert len(dataset) == len(local) == 7
    for place in range(len(local)):
        ours, theirs = dataset[place], local[place]
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            if isinstance(value, torch.Tensor):
                torch.testing.assert_close(ours[key], value, rtol=0, atol=0)
    assert ("pixel_values" in local[1]) == (write is not write_jsonl)


def test_a_spawned_worker_makes_the_same_samples(web, encoder, tmp_path):
    """Such a worker gets a pickled copy, of the window that was read last."""
    dataset = open_stream(str(web / "*.tar"), tmp_path, encoder)
    dataset.at(1)
    ticket = dataset.ticket(1, 2)
    copy = pickle.loads(pickle.dumps(dataset))
    torch.testing.assert_close(copy[ticket]["pixel_values"], dataset[ticket]["pixel_values"], rtol=0, atol=0)


def test_two_images_of_a_record_are_its_members_in_order(encoder, tmp_path):
    write_tar(tmp_path / "a.tar", [3])  # 000003.0.png is 64 wide, 000003.1.png is 128
    dataset = open_stream(str(tmp_path / "a.tar"), tmp_path / "cache", encoder)
    one, other = dataset[0]["image_grid_thw"].tolist()
    assert one[2] < other[2], "the second image is the wider one"


def test_messages_name_the_address_and_not_the_copy(web, encoder, tmp_path):
    with served(web) as server:
        dataset = open_stream(server.url("000.tar"), tmp_path, encoder)
        assert str(dataset[1]["source"]).startswith(server.url("000.tar[000001]")), dataset[1]["source"]


def test_a_stream_goes_on_where_it_was_saved_without_the_shards_before(web, encoder, tmp_path):
    """Each window, read again from what a checkpoint holds, and all that follows it."""
    with served(web) as server:
        url = server.url("{000..003}.tar")
        whole = open_stream(url, tmp_path / "whole", encoder)
        windows, saved, keys = [], [], []
        while len(whole.at(len(windows))):
            windows.append(record_ids(whole, len(windows)))
            saved.append(Saved.from_dict(json.loads(json.dumps(whole.saved(Totals(7, 8, 9, 10)).to_dict()))))
            keys.append(whole.at(whole.present).key())
        assert len(windows) >= 10
        for number, position in enumerate(saved):
            server.requests.clear()
            resumed = open_stream(url, tmp_path / str(number), encoder, saved=position)
            assert resumed.first == number
            assert resumed.before == Totals(7, 8, 9, 10)
            assert resumed.at(number).key() == keys[number]
            needed = {part.address.rpartition("/")[2] for part in resumed.windows.held[number].epochs.records.parts}
            assert set(server.requests) == needed, "it copied shards that are not in its window"
            assert all_windows(resumed) == windows[number:]
        begun_anew = open_stream(url, tmp_path / "anew", encoder, saved=Saved(5, Begin()))
        assert all_windows(begun_anew) != windows[5:], "vacuous: the position does not matter"


def test_only_the_shards_of_two_windows_stay_on_the_disk(tmp_path, encoder):
    write_shards(tmp_path / "web", shards=12, records=4, write=write_jsonl, ending="jsonl")
    with served(tmp_path / "web") as server:
        dataset = open_stream(server.url("{000..011}.jsonl"), tmp_path / "cache", encoder, rounds=1)
        window, most = 0, 0
        while len(dataset.at(window)):
            kept = {path.name for path in (tmp_path / "cache").rglob("*.jsonl")}
            needed = {
                part.address.rpartition("/")[2]
                for held in dataset.windows.held.values()
                for part in held.epochs.records.parts
            }
            assert kept == needed
            assert len(list((tmp_path / "cache" / "windows").iterdir())) <= 2
            assert len(dataset.planned_epochs) <= 2
            assert len(dataset.windows.stream._opened) == len(needed)
            most, window = max(most, len(kept)), window + 1
        assert window > 8
        assert most < 6, "nothing was removed"
        assert set(server.requests.values()) == {1}, "a shard was copied twice"
        dataset.close()
    assert not (tmp_path / "cache").exists()


@pytest.mark.soak
def test_memory_is_the_same_for_ten_times_the_records(tiny_dir):
    """100,000 records are read and planned; each of them as a Python object would take a kilobyte or more."""
    few, many = (stream_memory.measured(tiny_dir, count) for count in (10_000, 100_000))
    assert (few["records"], many["records"]) == (10_000, 100_000)
    assert many["most"] - few["most"] < 60
    assert many["disk"] < 1.5 * few["disk"]


def test_a_process_that_does_not_lead_removes_nothing(web, encoder, tmp_path):
    with served(web) as server:
        dataset = open_stream(server.url("{000..003}.tar"), tmp_path, encoder)
        dataset.windows.options.leads = False
        all_windows(dataset)
    assert len(list(tmp_path.rglob("*.tar"))) == 4


def test_shards_that_are_added_come_with_the_next_round(encoder, tmp_path):
    write_shards(tmp_path / "web", shards=2)
    selection, later = str(tmp_path / "web" / "*.tar"), tmp_path / "web" / "100.tar"
    dataset = open_stream(selection, tmp_path / "cache", encoder)
    first_round = [record_ids(dataset, 0)]
    write_tar(later, range(500, 504))
    saved = Saved.from_dict(json.loads(json.dumps(dataset.saved(Totals()).to_dict())))
    windows = first_round + all_windows(dataset)[1:]
    rounds = [list(chain(*windows[:3])), list(chain(*windows[3:]))]
    assert len(rounds[0]) == 15
    assert set(rounds[1]) == set(rounds[0]) | {f"r{number}" for number in range(500, 504)}
    assert all_windows(open_stream(selection, tmp_path / "again", encoder, saved=saved)) == windows


def test_a_shard_that_has_shrunk_is_an_error(encoder, tmp_path):
    write_tar(tmp_path / "a.tar", range(8))
    dataset = open_stream(str(tmp_path / "a.tar"), tmp_path / "cache", encoder)
    dataset.at(1)
    saved = dataset.saved(Totals())
    write_tar(tmp_path / "a.tar", range(3))
    with pytest.raises(DataError, match="has 3 records, but 5 of it were read"):
        open_stream(str(tmp_path / "a.tar"), tmp_path / "other", encoder, saved=saved)


# -- records that are left out -------------------------------------------------------------------------------------


def damaged_tar(path, numbers, *, bad):
    """Write a shard in which the records ``bad`` are no JSON."""
    with tarfile.open(path, "w") as tar:
        for number in numbers:
            text = json.dumps({"id": f"r{number}", "conversations": turns(number, images=0)}).encode()
            content = text[:-3] if number in bad else text
            entry = tarfile.TarInfo(f"{number:06d}.json")
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return path


def test_a_damaged_record_is_an_error_or_is_left_out_and_counted(encoder, tmp_path):
    damaged_tar(tmp_path / "a.tar", range(12), bad={6})
    with pytest.raises(DataError, match=r"a\.tar\[000006"):
        open_stream(str(tmp_path / "a.tar"), tmp_path / "raise", encoder)
    dataset = open_stream(str(tmp_path / "a.tar"), tmp_path / "skip", encoder, skip=True, max_bad_fraction=0.5)
    assert "left out" not in dataset.summary()
    assert len(dataset.at(1)) == 4
    assert "left out: 1 that cannot be read" in dataset.summary()
    assert dataset.saved(Totals()).begin.bad == 0
    assert len(dataset.at(2)) == 2
    assert dataset.saved(Totals()).begin.bad == 1


def test_too_many_damaged_records_stop_the_stream_when_they_come(encoder, tmp_path):
    damaged_tar(tmp_path / "a.tar", range(20), bad={11, 12, 13})
    dataset = open_stream(str(tmp_path / "a.tar"), tmp_path / "c", encoder, skip=True, max_bad_fraction=0.1)
    assert len(dataset.at(1)) == 5
    with pytest.raises(DataError, match=r"3 of the 15 samples so far.*max_bad_fraction=0\.1"):
        dataset.at(2)


def test_one_bad_record_of_a_short_last_window_is_a_share_of_all(encoder, tmp_path):
    damaged_tar(tmp_path / "a.tar", range(102), bad={100})
    dataset = open_stream(
        str(tmp_path / "a.tar"), tmp_path / "c", encoder, window=50, rounds=1, skip=True, max_bad_fraction=0.02
    )
    assert [len(dataset.at(window)) for window in range(4)] == [50, 50, 1, 0]


def test_a_window_without_a_sample_is_passed_over_and_reported(encoder, processor, tmp_path, caplog):
    """A record of many words is longer than a row; five of them fill a window."""
    long = [{"id": f"r{n}", "conversations": turns(n, images=0, longest=1)} for n in range(15)]
    for record in long[5:10]:
        record["conversations"] = [
            {"from": "human", "value": "many " * 200},
            {"from": "gpt", "value": "words"},
        ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, long)) + "\n")
    short = Encoder(processor, max_length=100, truncation_strategy="delete")
    dataset = open_stream(str(tmp_path / "a.jsonl"), tmp_path / "c", short, rounds=1)
    assert all_windows(dataset) == [[f"r{n}" for n in range(5)], [f"r{n}" for n in range(10, 15)]]
    assert "passed over: 5 longer than template.max_length" in caplog.text


def test_a_stream_without_a_single_sample_is_an_error(processor, tmp_path):
    write_jsonl(tmp_path / "a.jsonl", range(9))
    tiny = Encoder(processor, max_length=4, truncation_strategy="delete")
    with pytest.raises(DataError, match=r"no record can be used \(.*longer than template\.max_length"):
        open_stream(str(tmp_path / "a.jsonl"), tmp_path / "c", tiny, rounds=None)


def test_an_empty_shard_is_an_error_or_is_passed_over(encoder, tmp_path, caplog):
    write_jsonl(tmp_path / "a.jsonl", range(4))
    (tmp_path / "b.jsonl").write_text("\n")
    with pytest.raises(DataError, match=r"b\.jsonl has no records"):
        open_stream(str(tmp_path / "*.jsonl"), tmp_path / "raise", encoder)
    dataset = open_stream(str(tmp_path / "*.jsonl"), tmp_path / "skip", encoder, skip=True)
    assert all_windows(dataset) == [[f"r{n}" for n in range(4)]] * 2
    assert "b.jsonl has no records" in caplog.text


def test_a_cut_shard_counts_as_damaged(encoder, tmp_path):
    write_tar(tmp_path / "a.tar", range(6))
    content = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"cut off or damaged|unexpected end"):
        open_stream(str(tmp_path / "a.tar"), tmp_path / "raise", encoder)
    dataset = open_stream(
        str(tmp_path / "a.tar"), tmp_path / "skip", encoder, window=20, skip=True, max_bad_fraction=0.9
    )
    assert "left out: 1 that cannot be read" in dataset.summary()


# -- the plan ------------------------------------------------------------------------------------------------------


def test_ranks_have_as_many_batches_and_every_sample_is_in_one(web, encoder, tmp_path):
    """Two ranks, each with a stream of its own: no batch is missing, none is there twice."""
    shape = RunShape(data_ranks=2, accumulation=2)
    streams = [open_stream(str(web / "*.tar"), tmp_path / str(rank), encoder, rounds=1) for rank in range(2)]
    plans = [PlanSampler(streams[rank], shape, rank=rank, max_length=120) for rank in range(2)]
    trained, window = [], 0
    while all(len(stream.at(window)) for stream in streams):
        batches = []
        for stream, plan in zip(streams, plans, strict=True):
            plan.set_epoch(window)
            batches.append(list(plan))
            ids = record_ids(stream, window)
            trained += [ids[ticket.place] for batch in batches[-1] for ticket in batch if not ticket.filler]
        assert len(batches[0]) == len(batches[1])
        window += 1
    assert [len(stream.at(window)) for stream in streams] == [0, 0], "one rank's stream ends earlier"
    assert sorted(trained) == sorted(record for path in web.glob("*.tar") for record in ids_of(path))


def test_a_step_is_located_in_its_window_without_reading_on(web, encoder, tmp_path):
    dataset = open_stream(str(web / "*.tar"), tmp_path, encoder)
    plan = PlanSampler(dataset, RunShape(), max_length=120)
    steps = plan.steps(0)
    assert plan.locate(steps - 1) == (0, steps - 1)
    assert plan.locate(steps) == (0, steps)
    assert dataset.windows.last == 0, "the next window was read"
    dataset.at(1)
    assert plan.locate(steps) == (1, 0)
    assert plan.before(1) == plan.totals(0)


def test_reading_ahead_leaves_the_next_window_on_the_disk(web, encoder, tmp_path):
    with served(web) as server:
        dataset = open_stream(server.url("{000..003}.tar"), tmp_path, encoder)
        dataset.windows.options.reads_ahead = True
        dataset._read_ahead(1)
        dataset._ahead.join(60)
        assert dataset._ahead.exitcode == 0
        asked = sum(server.requests.values())
        lengths = list((tmp_path / "windows" / "1").glob("lengths-*.npz"))
        assert len(lengths) == 1
        written = lengths[0].stat().st_mtime_ns
        dataset.windows.options.reads_ahead = False
        assert len(dataset.at(1))
        assert sum(server.requests.values()) == asked, "a shard was copied again"
        assert lengths[0].stat().st_mtime_ns == written, "the window was measured again"
