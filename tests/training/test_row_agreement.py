"""Ranks that train a row together leave out the same samples, whichever of them finds a fault."""

import threading

import pytest
import torch
import torch.distributed as dist
from cases import ListRecords, picture, quiet_arguments
from rank_cases import in_ranks
from sequence_cases import in_float64

from qwenvl_ft.data.collate import QwenVLCollator, vision_fillers
from qwenvl_ft.data.conversation import IGNORE
from qwenvl_ft.data.plan.costs import CostModel
from qwenvl_ft.data.plan.dataset import SampleDataset
from qwenvl_ft.data.share import Share
from qwenvl_ft.errors import DataError
from qwenvl_ft.model.load import load_model
from qwenvl_ft.training.row_agreement import RowAgreement
from qwenvl_ft.training.trainer import QwenVLTrainer

SAME = ("input_ids", "labels", "position_ids", "cu_seq_lens_q", "image_owners", "image_tokens")


class Ranks:
    """Threads in place of ranks: `gather` waits for all of them."""

    def __init__(self, size):
        self.size = size
        self.barrier = threading.Barrier(size, timeout=60)
        self.given = [None] * size
        self.gathers = 0

    def gather(self, place):
        def every(own):
            self.given[place] = own
            self.barrier.wait()
            joined = torch.stack(self.given)
            if self.barrier.wait() == 0:  # one of the threads
                self.gathers += 1
            return joined

        return every

    def run(self, function):
        """Return what each rank's function of its place returns; an error is returned too."""
        results = [None] * self.size

        def call(place):
            try:
                results[place] = function(place)
            except DataError as error:
                results[place] = error

        threads = [threading.Thread(target=call, args=(place,)) for place in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


@pytest.fixture
def dataset(encoder, tmp_path):
    """Five records with an image file each."""
    records = []
    for k in range(5):
        picture(96, 64, k).save(tmp_path / f"{k}.png")
        turns = [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": f"Answer {k}, a long one."}]
        records.append({"image": str(tmp_path / f"{k}.png"), "conversations": turns})
    return SampleDataset(ListRecords(records), encoder, cache_dir=tmp_path / "cache", on_error="skip")


def agreed(dataset, size, before=lambda place, shared: None):
    """Return each rank's batch of all samples as it was made, and after the agreement, and the number of gathers."""
    processor, ranks = dataset.encoder.processor, Ranks(size)
    fillers = vision_fillers(processor)

    def rank(place):
        share = Share(size, place, processor.tokenizer.pad_token_id, CostModel())
        shared, collate = dataset.shared(share), QwenVLCollator(fillers, share=share)
        before(place, shared)
        batch = collate(shared.__getitems__([dataset.ticket(0, k) for k in range(len(dataset))]))
        made = {key: batch[key].clone() for key in SAME}
        return made, RowAgreement(place, ranks.gather(place))(batch, shared, collate)

    return ranks.run(rank), ranks


def supervised(batch):
    """Return the number of supervised tokens of each sample."""
    parts = batch["labels"][0].split(batch["cu_seq_lens_q"].diff().tolist())
    return [int((part != IGNORE).sum()) for part in parts]


def require_same(batches):
    for batch in batches[1:]:
        for key in SAME:
            assert torch.equal(batch[key], batches[0][key]), key


def test_without_a_fault_nothing_changes(dataset):
    results, ranks = agreed(dataset, 3)
    for made, batch in results:
        assert all(torch.equal(made[key], batch[key]) for key in SAME)
        assert "faults" not in batch
    assert ranks.gathers == 1


def test_what_its_owner_cannot_decode_has_labels_on_no_rank(dataset, tmp_path):
    (tmp_path / "2.png").write_bytes((tmp_path / "2.png").read_bytes()[:-200])
    results, ranks = agreed(dataset, 2)
    batches = [batch for _, batch in results]
    require_same(batches)
    assert ranks.gathers == 1
    whole = supervised(results[0][0])
    assert sum(supervised(made)[2] > 0 for made, _ in results) == 2, "labelled until they agree"
    for batch in batches:
        assert supervised(batch) == [count if k != 2 else 0 for k, count in enumerate(whole)]
    owner = int(batches[0]["image_owners"][2])
    assert "faults" not in batches[1 - owner], "each fault is reported once"
    assert len(batches[owner]["faults"]) == 1
    assert "2.png is damaged" in batches[owner]["faults"][0]


@pytest.mark.parametrize("place", [0, 2])
def test_what_one_rank_cannot_read_at_all_is_made_again_without_it(dataset, place):
    """A disk that fails once, on one rank: its row has no images of that record, and the others' do."""

    def fail_once(own, shared):
        plain = shared.draft

        def draft(ticket):
            if own == place and ticket.place == 3 and not failed:
                failed.append(ticket)
                raise DataError("list[3]: the disk does not answer.")
            return plain(ticket)

        shared.draft = draft

    failed = []
    results, ranks = agreed(dataset, 3, fail_once)
    made, batches = [made for made, _ in results], [batch for _, batch in results]
    assert not torch.equal(made[place]["image_owners"], made[1]["image_owners"]), "vacuous: the rows were the same"
    require_same(batches)
    assert ranks.gathers == 2
    assert len(batches[0]["image_owners"]) == 4
    begin, end = batches[0]["cu_seq_lens_q"][3:5].tolist()
    assert (batches[0]["input_ids"][0, begin:end] == dataset.encoder.processor.tokenizer.pad_token_id).all()
    kept = supervised(made[1])
    assert supervised(batches[0]) == [count if k != 3 else 0 for k, count in enumerate(kept)]
    assert [batch.get("faults") for batch in batches] == [
        ["list[3]: the disk does not answer."] if own == place else None for own in range(3)
    ]


def test_what_no_rank_can_read_is_reported_once_without_another_round(dataset, tmp_path):
    (tmp_path / "1.png").unlink()
    results, ranks = agreed(dataset, 2)
    require_same([batch for _, batch in results])
    assert ranks.gathers == 1
    assert [len(batch.get("faults", [])) for _, batch in results] == [1, 0]


def differing(own, shared):
    """On one rank, the second record is another one of the same length."""
    plain = shared.draft
    shared.draft = lambda ticket: plain(ticket._replace(place=0) if own == 1 and ticket.place == 1 else ticket)


def test_ranks_that_read_different_files_leave_the_sample_out(dataset):
    results, _ = agreed(dataset, 2, differing)
    batches = [batch for _, batch in results]
    require_same(batches)
    assert supervised(batches[0])[1] == 0
    assert batches[0]["faults"] == ["list[1]: another rank that trains this row reads it differently"]
    assert "faults" not in batches[1]


def test_or_they_all_stop_if_errors_are_raised(dataset):
    dataset.on_error = "raise"
    errors, _ = agreed(dataset, 2, differing)
    assert all(isinstance(error, DataError) for error in errors)
    assert "list[1]: the processes that train this row together read different content" in str(errors[0])
    assert "data.on_error=skip" in str(errors[1])


def _trained(folder, checkpoint, dataset, size):
    """Train two steps of one row in this rank, and return what is logged."""
    model = in_float64(load_model(str(checkpoint), torch_dtype="float32", attn_impl="packed_sdpa"))
    args = quiet_arguments(folder, optim="sgd", learning_rate=0.05, max_steps=2, logging_steps=1, save_strategy="no")
    trainer = QwenVLTrainer(
        model,
        args,
        processor=dataset.encoder.processor,
        train_dataset=dataset,
        eval_dataset=dataset,
        max_length=512,
        sequence_parallel_size=size,
    )
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry], trainer.evaluate()


def _refused(folder, checkpoint, dataset):
    """Train in this rank, where the first pair of ranks reads different files; return the error."""
    differing(dist.get_rank(), dataset)
    try:
        _trained(folder, checkpoint, dataset, 2)
    except DataError as error:
        return str(error)


@pytest.mark.soak
@pytest.mark.distributed
def test_ranks_that_read_different_files_stop_those_of_other_rows_too(dataset, checkpoints, tmp_path):
    dataset.on_error = "raise"
    errors = in_ranks(4, _refused, tmp_path / "run", checkpoints["dense"], dataset)
    assert all("this row together read different content" in error for error in errors)


@pytest.mark.soak
@pytest.mark.distributed
def test_two_ranks_train_around_a_damaged_image_as_one_process_does(dataset, checkpoints, tmp_path):
    dataset.max_bad_fraction = 0.5
    whole = in_ranks(1, _trained, tmp_path / "whole", checkpoints["dense"], dataset, 1)[0][0]
    (tmp_path / "2.png").write_bytes((tmp_path / "2.png").read_bytes()[:-200])
    alone = in_ranks(1, _trained, tmp_path / "alone", checkpoints["dense"], dataset, 1)[0]
    for logs, evaluated in in_ranks(2, _trained, tmp_path / "shared", checkpoints["dense"], dataset, 2):
        for log, expected in zip(logs, alone[0], strict=True):
            assert log["loss"] == pytest.approx(expected["loss"], rel=1e-6)
            assert log["bad_samples"] == expected["bad_samples"] == 1
            assert log["supervised_tokens"] == expected["supervised_tokens"]
        assert evaluated["eval_loss"] == pytest.approx(alone[1]["eval_loss"], rel=1e-6)
        assert evaluated["eval_bad_samples"] == 1
    assert whole[0]["loss"] != pytest.approx(alone[0][0]["loss"], rel=1e-6), "vacuous"
