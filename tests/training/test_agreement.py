"""Ranks that meet different errors raise errors of one kind, so that all of them save, or none."""

from types import SimpleNamespace

import pytest
import torch.distributed as dist
from rank_cases import in_ranks

from qwenvl_ft.errors import DataError, TrainingError
from qwenvl_ft.training.agreement import Agreement, OtherRankError
from qwenvl_ft.training.row_trainer import RowTrainer

ERRORS = {
    "none": (None, None),
    "one record": (None, DataError("a.jsonl:7")),
    "one fault": (None, KeyError("a")),
    "two faults": (KeyError("a"), ValueError("b")),
    "fault before record": (KeyError("a"), DataError("a.jsonl:7")),
    "record before fault": (DataError("a.jsonl:7"), KeyError("a")),
    "later step": (TrainingError("step 4", step=4), TrainingError("step 3", step=3)),
}


def _raise(error):
    if error is not None:
        raise error


def _met():
    """Return case -> type and text of what this rank raises, and whether it knows that all ranks raise it."""
    rank, met = dist.get_rank(), {}
    agreement = Agreement.of(SimpleNamespace(world_size=2, ddp_timeout=60))
    for case, errors in ERRORS.items():
        try:
            agreement.together(lambda own=errors[rank]: _raise(own))
            met[case] = None
        except Exception as error:
            met[case] = (type(error), str(error), agreement.is_shared(error))
    rows = SimpleNamespace(
        row_agreement=lambda *_: _raise(DataError("a.jsonl:8") if rank == 1 else None),
        share="share",
        agreement=agreement,
        _collator=lambda: None,
    )
    try:  # of a group that the other rank does not belong to
        RowTrainer.agreed(rows, {}, SimpleNamespace(shared=lambda share: None))
    except DataError as error:
        met["row of a group"] = str(error)
    return met


@pytest.mark.distributed
def test_ranks_that_meet_different_errors_raise_errors_of_one_kind():
    first, second = in_ranks(2, _met)
    assert first["none"] is second["none"] is None
    assert first["one record"] == second["one record"] == (DataError, "a.jsonl:7", True)
    assert first["one fault"] == (OtherRankError, "rank 1 stopped: KeyError: 'a'.", True)
    assert second["one fault"] == (KeyError, "'a'", True)
    assert [met["two faults"][0] for met in (first, second)] == [KeyError, ValueError]
    assert second["fault before record"] == (OtherRankError, "rank 0 stopped: KeyError: 'a'.", True)
    assert first["record before fault"] == second["record before fault"] == (DataError, "a.jsonl:7", True)
    assert first["later step"] == second["later step"] == (TrainingError, "step 3", True)
    assert first["row of a group"] == second["row of a group"] == "a.jsonl:8"
