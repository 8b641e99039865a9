"""Run by torchrun with the arguments of a run: trains; every rank writes how its parameters were sharded.

With KILLED_AT the last rank kills itself at the end of that step, unless its launcher has restarted it.
"""

import json
import os
import signal
import sys
from pathlib import Path

from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, trainer

from qwenvl_ft.train import main

RANK, RANKS = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


class Watch(TrainerCallback):
    """Writes ``sharding-RANK.json``: parameter -> shape of its mesh, elements on this rank, and in all."""

    def on_step_end(self, args, state, control, **_):
        first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
        if first and RANK == RANKS - 1 and str(state.global_step) == os.environ.get("KILLED_AT"):
            os.kill(os.getpid(), signal.SIGKILL)

    def on_train_end(self, args, state, control, model=None, **_):
        found = {
            name: [list(value.device_mesh.shape), value.to_local().numel(), value.numel()]
            if isinstance(value, DTensor)
            else [[], value.numel(), value.numel()]
            for name, value in model.named_parameters()
        }
        Path(args.output_dir, f"sharding-{RANK}.json").write_text(json.dumps(found))


trainer.DEFAULT_CALLBACKS.append(Watch)
sys.exit(main())
