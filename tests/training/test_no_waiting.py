"""A training step on a GPU never waits for the device, except where a log line is written."""

import pytest
import torch
from cases import RECORDS, ListRecords, quiet_arguments
from transformers import TrainerCallback

from qwenvl_ft.data.encode.encoder import Encoder
from qwenvl_ft.data.plan.dataset import SampleDataset
from qwenvl_ft.model.load import load_model
from qwenvl_ft.training.trainer import QwenVLTrainer
from qwenvl_ft.upstream.arguments import as_installed


class Forbidden(TrainerCallback):
    """From the third step on (kernels are loaded in the first) every wait is an error."""

    steps = 0

    def on_step_begin(self, args, state, control, **_):
        if state.global_step >= 2:
            torch.cuda.set_sync_debug_mode("error")

    def on_step_end(self, args, state, control, **_):
        Forbidden.steps += torch.cuda.get_sync_debug_mode() == 2
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("checkpointing", [False, True])
def test_no_step_waits(tmp_path, tiny_dir, processor, checkpointing):
    args = quiet_arguments(
        tmp_path,
        use_cpu=False,
        bf16=True,
        max_steps=6,
        logging_steps=100,
        logging_first_step=False,
        save_strategy="no",
        **as_installed(
            {
                "activation_checkpointing": checkpointing,
                "activation_checkpointing_kwargs": {"use_reentrant": False} if checkpointing else None,
            }
        ),
    )
    model = load_model(str(tiny_dir), torch_dtype="bfloat16")
    dataset = SampleDataset(ListRecords(RECORDS), Encoder(processor, raw_pixels=True), cache_dir=tmp_path / "cache")
    trainer = QwenVLTrainer(model, args, processor=processor, train_dataset=dataset, max_length=200)
    Forbidden.steps = 0
    trainer.add_callback(Forbidden())
    try:
        trainer.train()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert Forbidden.steps == 4
