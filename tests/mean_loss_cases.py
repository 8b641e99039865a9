"""A run at learning rate 0, whose losses can be computed by hand; torchrun starts it in two processes."""

import json
import os
import sys
from itertools import chain
from pathlib import Path

from cases import make_trainer

EPOCHS = 2


def run(folder, checkpoint, encoder, options, arguments):
    """Train two epochs of the eight standard records; return the logged losses and the samples of each step."""
    trainer = make_trainer(
        folder,
        checkpoint,
        encoder,
        trainer_options=options,
        datasets=["odd" if i % 2 else "even" for i in range(8)],
        per_device_train_batch_size=1,
        max_steps=-1,
        num_train_epochs=EPOCHS,
        **arguments,
    )
    output = trainer.train()
    sampler, size = trainer.train_sampler, trainer.args.gradient_accumulation_steps
    steps = []
    for epoch in range(EPOCHS):
        passes = [[i for batch in ranks for i in batch if i >= 0] for ranks in sampler.plan(epoch)]
        steps += [list(chain(*passes[k : k + size])) for k in range(0, len(passes), size)]
    history = trainer.state.log_history
    return {
        "losses": [[entry["step"], entry["loss"]] for entry in history if "loss" in entry],
        "train_loss": [output.training_loss, output.metrics["train_loss"], history[-1]["train_loss"]],
        "steps": steps,
    }


def main():
    import torch

    from qwenvl_ft.data.encode.encoder import Encoder
    from qwenvl_ft.model.load import load_processor
    from qwenvl_ft.training.ranks import leave_ranks

    torch.set_num_threads(1)
    folder, checkpoint = Path(sys.argv[1]), sys.argv[2]
    found = run(folder, checkpoint, Encoder(load_processor(checkpoint)), *map(json.loads, sys.argv[3:]))
    (folder / f"rank{os.environ['RANK']}.json").write_text(json.dumps(found))
    leave_ranks()


if __name__ == "__main__":
    main()
