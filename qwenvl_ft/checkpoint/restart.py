"""Was this process started again after a failure? Such a run goes on from its last checkpoint by itself.

torchrun and accelerate (``--max_restarts``) start all processes of a run again after one has failed, and Slurm starts a
job again after a node has failed or the job was preempted (``--requeue``): with the command of the first start, which
may say nothing of a checkpoint. A fresh start would then refuse the folder of the run that it is.
"""

import os
from collections.abc import Mapping

from qwenvl_ft.checkpoint.complete import is_fresh

COUNTERS = {
    "TORCHELASTIC_RESTART_COUNT": "torchrun",
    "SLURM_RESTART_COUNT": "Slurm",
}
"""Environment variable that counts restarts, both documented -> who sets it."""


def restarts(environment: Mapping[str, str] | None = None) -> dict[str, int]:
    """Return who has started this run again -> how often; empty for a first start."""
    environment = os.environ if environment is None else environment
    counts = {who: environment.get(name, "") for name, who in COUNTERS.items()}
    return {who: int(count) for who, count in counts.items() if count.isdigit() and int(count) > 0}


def resume_setting(setting: str | bool | None) -> str | bool | None:
    """Return ``training.resume_from_checkpoint`` as this start means it: ``auto`` if a fresh start was started again.

    With ``auto`` a run that failed before its first checkpoint begins anew.
    """
    return "auto" if is_fresh(setting) and restarts() else setting
