"""The line before the first step, and the forecast of a check, state what the steps of a run really hold."""

import pytest
from cases import RECORDS, make_trainer
from run_cases import short_run, write_questions
from transformers import TrainerCallback

from qwenvl_ft import train
from qwenvl_ft.data.plan.packing import RunShape
from qwenvl_ft.data.plan.step_size import StepSize
from qwenvl_ft.look.check import check_recipe
from qwenvl_ft.look.check_report import epoch as forecast_lines
from qwenvl_ft.look.selection import target_recipe
from qwenvl_ft.recipe.load import load_recipe
from qwenvl_ft.training.callbacks.run_log import RunLog

CASES = {
    "samples": ({"packing": False}, 2, 2, "4 samples (2 x 2 accumulated x 1 processes)"),
    "a smaller last step": (
        {"packing": False},
        3,
        1,
        "3 samples (3 x 1 accumulated x 1 processes; the last of an epoch holds 2 samples)",
    ),
    "fewer samples than fit": (
        {"packing": False},
        1,
        16,
        "8 samples: the whole epoch, although 16 samples would fit (1 x 16 accumulated x 1 processes)",
    ),
    "rows": ({"packing": True, "max_length": 200}, 1, 2, "2 rows, {mean} samples on average (1 x 2 accumulated"),
    "fewer rows than fit": (
        {"packing": True, "max_length": 1000},
        1,
        16,
        "1 row, 8 samples: the whole epoch, although 16 rows would fit (1 x 16 accumulated x 1 processes)",
    ),
}


class Counted(TrainerCallback):
    """Counts the samples of each step in the batches that the model gets, by the restarts of their positions."""

    def __init__(self):
        self.steps, self.now = [], 0

    def watch(self, trainer):
        plain = trainer.training_step

        def counted(model, inputs, num_items_in_batch=None):
            self.now += int((inputs["position_ids"][0] == 0).sum())
            return plain(model, inputs, num_items_in_batch)

        trainer.training_step = counted

    def on_step_end(self, args, state, control, **_):
        self.steps.append(self.now)
        self.now = 0


@pytest.mark.parametrize("case", CASES)
def test_the_line_states_the_samples_that_the_steps_of_an_epoch_hold(tmp_path, tiny_dir, encoder, capsys, case):
    options, rows, accumulation, expected = CASES[case]
    trainer = make_trainer(
        tmp_path,
        tiny_dir,
        encoder,
        trainer_options=options,
        max_steps=-1,
        num_train_epochs=1,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=accumulation,
    )
    counted = Counted()
    counted.watch(trainer)
    trainer.add_callback(counted)
    trainer.add_callback(RunLog())
    trainer.train()
    assert sum(counted.steps) == len(RECORDS)
    mean = f"{len(RECORDS) / len(counted.steps):.1f}"
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "steps of" in line]
    assert line.startswith(f"{len(counted.steps)} steps of {expected.format(mean=mean)}")
    assert line.endswith("; from step 0")
    if not options["packing"]:
        assert line.startswith(f"{len(counted.steps)} steps of {counted.steps[0]} samples")
        assert f"holds {counted.steps[-1]} sample" in line or len(set(counted.steps)) == 1


@pytest.mark.parametrize("packing", ["true", "false"])
def test_check_states_the_same_as_the_run(tmp_path, tiny_dir, capsys, packing):
    data = write_questions(tmp_path, 9)
    more = ("template.max_length=200", f"training.packing={packing}", "training.gradient_accumulation_steps=4")
    settings = short_run(tiny_dir, data, tmp_path / "run", *more, "training.num_train_epochs=1")
    report = check_recipe(target_recipe([str(data), "--model", str(tiny_dir), *more]), quiet=True)
    (forecast,) = [line for line in forecast_lines(report.splits["train"]) if "steps per epoch" in line]
    train(load_recipe(None, settings))
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "steps of" in line]
    steps, _, size = line.partition(" steps of ")
    assert forecast.strip() == f"steps per epoch: {steps}, of {size.removesuffix('; from step 0')}"


def test_the_rows_of_all_processes_count():
    size = StepSize(RunShape(data_ranks=4, rows_per_batch=2, accumulation=3), rows=50, samples=200, packing=True)
    assert (size.room, size.steps, size.last) == (24, 3, 2)
    assert str(size).startswith("24 rows, 66.7 samples on average (2 x 3 accumulated x 4 processes; the last")
