"""The same samples give the same loss and gradients, however they are split; so does eval_loss."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import RECORDS, make_trainer, one_step

from qwenvl_ft.data.collate import QwenVLCollator
from qwenvl_ft.model.load import load_model

SPLITS = {
    "8x1": ({"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}, {}),
    "4x2": ({"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}, {}),
    "2x4": ({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}, {}),
    "1x8": ({"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}, {}),
    "packed": ({"per_device_train_batch_size": 1}, {"packing": True, "max_length": 200}),
    "padded": ({"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}, {"padding_free": False}),
}


def by_hand(checkpoint, encoder, records, factors=(1.0, 1.0)):
    """Return the summed cross entropy of each sample alone, by the upstream class, over all supervised tokens.

    ``factors`` are the weights of the tokens of even and of odd records.
    """
    model = load_model(str(checkpoint), torch_dtype="float32", attn_impl="sdpa")
    samples = [encoder(record) for record in records]
    weights = [int((sample["labels"] != -100).sum()) * factors[i % 2] for i, sample in enumerate(samples)]
    total = 0.0
    for sample, weight in zip(samples, weights, strict=True):
        total = total + model(**QwenVLCollator()([sample])).loss * weight
    loss = total / sum(weights)
    loss.backward()
    return float(loss), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.fixture(scope="module")
def reference(tiny_dir, encoder):
    return by_hand(tiny_dir, encoder, RECORDS)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def assert_same(loss, grads, reference):
    assert abs(loss - reference[0]) <= 1e-5 * abs(reference[0])
    for name, grad in reference[1].items():
        assert float((grads[name] - grad).abs().max()) <= 1e-5 * float(grad.abs().max()) + 1e-12, name


@pytest.mark.parametrize("split", SPLITS)
def test_any_split_gives_the_hand_computed_loss_and_gradients(tmp_path, tiny_dir, encoder, reference, split):
    arguments, options = SPLITS[split]
    if split == "packed":
        trainer = make_trainer(tmp_path, tiny_dir, encoder, trainer_options=options, **arguments)
        rows = len(trainer.get_train_dataloader())
        assert 1 < rows < 8, "vacuous: nothing was packed"
        arguments = arguments | {"gradient_accumulation_steps": rows}
    trainer = make_trainer(tmp_path, tiny_dir, encoder, trainer_options=options, **arguments)
    assert_same(*one_step(trainer), reference)


def test_a_mean_of_means_would_differ(reference, tiny_dir, encoder):
    """Guard: a plain Trainer computes another loss for 8 accumulated batches."""
    model = load_model(str(tiny_dir), torch_dtype="float32", attn_impl="sdpa")
    with torch.no_grad():
        means = [float(model(**QwenVLCollator()([encoder(record)])).loss) for record in RECORDS]
    assert abs(sum(means) / len(means) - reference[0]) > 1e-3 * reference[0]


@pytest.mark.parametrize(("size", "packing"), [(1, False), (3, False), (8, False), (1, True), (2, True)])
def test_eval_loss_is_independent_of_the_batch(tmp_path, tiny_dir, encoder, reference, size, packing):
    options = {"packing": packing, "max_length": 200}
    trainer = make_trainer(tmp_path, tiny_dir, encoder, trainer_options=options, per_device_eval_batch_size=size)
    metrics = trainer.evaluate()
    assert abs(metrics["eval_loss"] - reference[0]) <= 1e-6 * reference[0]
    assert metrics["eval_perplexity"] == pytest.approx(torch.exp(torch.tensor(reference[0])).item(), rel=1e-5)


def run_two(folder, *words):
    """Output of two processes: loss, gradients and eval_loss."""
    script = Path(__file__).with_name("two_processes.py")
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    arguments = [*launch, str(script), str(folder), *map(str, words)]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=300, env=env, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return torch.load(folder / "out.pt", weights_only=True)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("packing", "records"),
    [
        pytest.param("single", 8, marks=pytest.mark.soak),
        ("packed", 8),
        pytest.param("single", 7, marks=pytest.mark.soak),
    ],
)
def test_two_processes_give_the_same_loss_gradients_and_eval_loss(tmp_path, tiny_dir, encoder, packing, records):
    """Seven records leave rank 1 without a sample in the last micro-batch: it runs a filler."""
    out = run_two(tmp_path, tiny_dir, packing, str(records))
    expected = by_hand(tiny_dir, encoder, RECORDS[:records])
    assert_same(out["loss"], out["grads"], expected)
    assert abs(out["eval_loss"] - expected[0]) <= 1e-6 * expected[0]


@pytest.mark.soak
@pytest.mark.distributed
def test_processes_that_see_other_data_end_with_one_line_instead_of_waiting(tmp_path, tiny_dir):
    with pytest.raises(RuntimeError, match=r"data: rank 0 sees 8 samples but rank 1 sees 7\. Check that every machine"):
        run_two(tmp_path, tiny_dir, "other data", 8)


@pytest.mark.soak
@pytest.mark.distributed
def test_two_processes_weigh_data_sets_alike(tmp_path, tiny_dir, encoder, reference):
    """The ranks have tokens of different data sets: weights are summed over both. Evaluation is not weighted."""
    out = run_two(tmp_path, tiny_dir, "single", 8, json.dumps({"even": 3.0, "odd": 0.25}))
    expected = by_hand(tiny_dir, encoder, RECORDS, factors=(3.0, 0.25))
    assert_same(out["loss"], out["grads"], expected)
    assert abs(expected[0] - reference[0]) > 1e-3 * reference[0], "vacuous: the weights change nothing"
    assert abs(out["eval_loss"] - reference[0]) <= 1e-6 * reference[0]
