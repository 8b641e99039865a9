"""``loss`` of each log line and ``train_loss`` are means over the supervised tokens of all their steps and ranks."""

import json
import math
import os
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from cases import RECORDS, make_trainer
from mean_loss_cases import run

from qwenvl_ft.data.collate import QwenVLCollator
from qwenvl_ft.model.load import load_model
from qwenvl_ft.training.callbacks.run_log import describe
from qwenvl_ft.training.mean_loss import MeanLoss

CASES = {
    "every step": ({}, {"logging_steps": 1}),
    "every second of accumulated steps": ({}, {"logging_steps": 2, "gradient_accumulation_steps": 3}),
    "every third": ({}, {"logging_steps": 3}),
    "seldom": ({}, {"logging_steps": 10}),
    "never": ({}, {"logging_steps": 100}),
    "packed": ({"packing": True, "max_length": 200}, {"logging_steps": 2}),
    "weighted": ({"loss_weights": {"even": 3.0, "odd": 0.25}}, {"logging_steps": 3, "gradient_accumulation_steps": 2}),
}


@pytest.fixture(scope="module")
def by_hand(tiny_dir, encoder):
    """Return the summed cross entropy and the number of supervised tokens of each record, by the upstream class."""
    model = load_model(str(tiny_dir), torch_dtype="float32", attn_impl="sdpa")
    samples = [encoder(record) for record in RECORDS]
    counts = [int((sample["labels"] != -100).sum()) for sample in samples]
    with torch.no_grad():
        means = [float(model(**QwenVLCollator()([sample])).loss) for sample in samples]
    return [mean * count for mean, count in zip(means, counts, strict=True)], counts


def mean(by_hand, samples, factors):
    sums, counts = by_hand
    samples = list(samples)
    return sum(sums[i] * factors[i % 2] for i in samples) / sum(counts[i] * factors[i % 2] for i in samples)


def assert_means_by_hand(found, case, by_hand):
    """Compare each logged loss with the mean over the tokens since the last one, and the end with that of all."""
    weights = CASES[case][0].get("loss_weights", {"even": 1.0, "odd": 1.0})
    factors, steps = [weights["even"], weights["odd"]], found["steps"]
    logged = [0, *(step for step, _ in found["losses"])]
    every = CASES[case][1]["logging_steps"]
    assert logged == list(range(0, len(steps) + 1, every))
    for begin, (end, loss) in zip(logged, found["losses"], strict=False):
        assert loss == pytest.approx(mean(by_hand, chain(*steps[begin:end]), factors), rel=1e-5)
    whole = mean(by_hand, chain(*steps), factors)
    assert found["train_loss"] == pytest.approx([whole] * 3, rel=1e-5)
    of_steps = [mean(by_hand, step, factors) for step in steps]
    assert abs(sum(of_steps) / len(of_steps) - whole) > 1e-4 * whole, "vacuous: the mean of means is the same"


@pytest.mark.parametrize("case", CASES)
def test_losses_are_means_over_tokens_by_hand(tmp_path, tiny_dir, encoder, by_hand, case):
    assert_means_by_hand(run(tmp_path, tiny_dir, encoder, *CASES[case]), case, by_hand)


@pytest.mark.soak
@pytest.mark.distributed
@pytest.mark.parametrize("case", ["every third", "seldom", "weighted"])
def test_two_processes_log_the_mean_over_the_tokens_of_both(tmp_path, tiny_dir, by_hand, case):
    script = Path(__file__).resolve().parents[1] / "mean_loss_cases.py"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    command = [*launch, str(tmp_path), str(tiny_dir), *(json.dumps(part) for part in CASES[case])]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert_means_by_hand(ranks[0], case, by_hand)
    assert ranks[0]["train_loss"] == ranks[1]["train_loss"]


def test_a_resumed_run_logs_the_losses_of_the_run_that_was_not_interrupted(tmp_path, tiny_dir, encoder):
    """The checkpoint of step 3 lies between the log lines of steps 2 and 4, so step 3 must not be lost."""
    options = {"max_steps": 7, "logging_steps": 2, "learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 3}
    options["per_device_train_batch_size"] = 1

    def losses(trainer, checkpoint=None):
        end = trainer.train(resume_from_checkpoint=checkpoint).training_loss
        return {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry} | {"end": end}

    whole = losses(make_trainer(tmp_path, tiny_dir, encoder, **options))
    trainer = make_trainer(tmp_path, tiny_dir, encoder, **options)
    resumed = losses(trainer, str(tmp_path / "checkpoint-3"))
    assert resumed == whole
    assert list(whole) == [2, 4, 6, "end"]
    again = losses(trainer)
    assert again["end"] < whole["end"], "a second call begins with the trained weights, and at zero"


def test_a_skipped_step_is_left_out_of_the_mean_and_counted():
    """In float16 a step whose gradients overflow is not taken; accelerate's optimizer says so."""
    accelerator = Accelerator(cpu=True)
    weight = torch.nn.Parameter(torch.ones(2))
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    optimizer = AcceleratedOptimizer(torch.optim.SGD([weight], lr=0.1), device_placement=False, scaler=scaler)
    mean, losses = MeanLoss(), [(6.0, 3), (100.0, 1), (2.0, 1)]
    for (loss, tokens), gradient in zip(losses, (1.0, float("inf"), 1.0), strict=True):
        mean.add(torch.tensor(loss / 2), tokens)  # two micro-batches
        mean.add(torch.tensor(loss / 2), 0)
        before = weight.detach().clone()
        scaler.scale((weight * gradient).sum()).backward()
        optimizer.step()
        assert optimizer.step_was_skipped == torch.equal(weight, before) == math.isinf(gradient)
        mean.on_optimizer_step(None, None, None, optimizer=optimizer)
        optimizer.zero_grad()
    assert mean.since_log(accelerator) == {"loss": pytest.approx(8 / 4), "skipped_steps": 1}
    assert mean.since_log(accelerator) == {}, "nothing was trained on, which is no loss of 0"
    assert mean.of_run(accelerator) == pytest.approx(8 / 4)
    assert describe({"skipped_steps": 1}) == "skipped steps 1"
