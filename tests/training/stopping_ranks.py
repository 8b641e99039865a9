"""Run by torchrun: what one of two ranks meets stops both at the same place. Each case writes a JSON file."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from run_cases import short_run

from qwenvl_ft import train
from qwenvl_ft.checkpoint.complete import last_checkpoint
from qwenvl_ft.errors import QwenVLError
from qwenvl_ft.evaluation import generate as generating
from qwenvl_ft.recipe.load import load_recipe
from qwenvl_ft.training.ranks import leave_ranks
from qwenvl_ft.training.stopping_trainer import StoppingTrainer
from qwenvl_ft.training.trainer import QwenVLTrainer

RANK = int(os.environ["RANK"])
GUARDED, COMPUTE = StoppingTrainer.guarded, QwenVLTrainer.compute_loss
CALL = generating._Interruption.__call__


def signalled(self, loader):
    """Rank 1 gets SIGTERM in the first batch of the evaluation at step 4."""
    for batch in GUARDED(self, loader):
        if RANK == 1 and self.state.global_step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        yield batch


def poisoned(self, model, inputs, *arguments, **options):
    """The loss of rank 1 is not a number in step 3."""
    loss = COMPUTE(self, model, inputs, *arguments, **options)
    if RANK == 1 and self.state.global_step == 2 and model.training:
        loss = loss * float("nan")
        inputs["batch"].loss = loss.detach()
    return loss


def interrupted(self, ids, scores, **more):
    """Rank 1 gets SIGTERM at its first token."""
    if RANK == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    return CALL(self, ids, scores, **more)


def main() -> None:
    folder, checkpoint = Path(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    asked = ["evaluation.run_after_training=true", "evaluation.max_new_tokens=50", "evaluation.batch_size=1"]
    evaluates = ["training.eval_strategy=steps", "training.eval_steps=2"]
    locked = folder / "locked"
    cases = {
        "signal in an evaluation": ("sound", (StoppingTrainer, "guarded", signalled), evaluates),
        "damaged in training": ("damaged", None, []),
        "damaged in evaluation": ("sound", None, [*evaluates, f"data.val={folder / 'damaged' / 'train.jsonl'}"]),
        "nan": ("sound", (QwenVLTrainer, "compute_loss", poisoned), []),
        "nan after the last log line": (
            "sound",
            (QwenVLTrainer, "compute_loss", poisoned),
            ["training.logging_steps=9"],
        ),
        "signal in the last answers": ("sound", (generating._Interruption, "__call__", interrupted), asked),
        "damaged question": ("sound", None, [*asked, f"evaluation.data={folder / 'damaged' / 'train.jsonl'}"]),
        "locked": ("sound", None, [f"training.output_dir={locked}"]),
    }
    for case in sys.argv[3:]:
        data, patched, more = cases[case]
        output = folder / case.replace(" ", "-")
        words = short_run(
            checkpoint,
            folder / data / "train.jsonl",
            output,
            f"data.val={folder / 'sound' / 'train.jsonl'}",
            "tuner.train_type=lora",
            "template.max_length=160",
            "training.packing=false",
            "training.per_device_train_batch_size=1",
            "training.per_device_eval_batch_size=1",
            "training.gradient_accumulation_steps=1",
            "training.max_steps=4",
            "training.logging_steps=1",
            "training.save_strategy=no",
            "training.use_cpu=true",
            *more,
        )
        if not {"training.eval_strategy=steps", "evaluation.run_after_training=true"} & set(more):
            words = [word for word in words if not word.startswith("data.val=")]
        plain = getattr(*patched[:2]) if patched else None
        if patched:
            setattr(*patched)
        begin, answer = time.monotonic(), {}
        try:
            result = train(load_recipe(None, words))
            answer |= {"steps": result.steps, "stopped_by": result.stopped_by}
        except QwenVLError as error:
            answer |= {"error": type(error).__name__, "message": str(error)}
        if patched:
            setattr(*patched[:2], plain)
        saved = last_checkpoint(output)
        answer |= {"case": case, "rank": RANK, "saved": saved and saved.name, "seconds": time.monotonic() - begin}
        (folder / f"{case}-{RANK}.json").write_text(json.dumps(answer))
    leave_ranks()


main()
