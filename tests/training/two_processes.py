"""Run by torchrun: one optimizer step and one evaluation over the standard records; rank 0 writes the results."""

import json
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from cases import RECORDS, make_trainer, one_step

from qwenvl_ft.data.encode.encoder import Encoder
from qwenvl_ft.model.load import load_processor
from qwenvl_ft.training.ranks import leave_ranks


def main() -> None:
    folder, checkpoint, packing, records = Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
    weights = json.loads(sys.argv[5]) if len(sys.argv) > 5 else {}
    torch.set_num_threads(1)
    encoder = Encoder(load_processor(checkpoint))
    if packing == "other data":
        records -= int(os.environ["RANK"])
    trainer = make_trainer(
        folder,
        checkpoint,
        encoder,
        records=RECORDS[:records],
        per_device_train_batch_size=1,
        per_device_eval_batch_size=1,
        gradient_accumulation_steps=4,
        trainer_options={"packing": packing == "packed", "max_length": 200, "loss_weights": weights},
        datasets=["odd" if i % 2 else "even" for i in range(records)],
        ddp_backend="gloo",
    )
    loss, grads = one_step(trainer)
    eval_loss = trainer.evaluate()["eval_loss"]
    if trainer.is_world_process_zero():
        torch.save({"loss": loss, "grads": grads, "eval_loss": eval_loss}, folder / "out.pt")
    leave_ranks()


main()
