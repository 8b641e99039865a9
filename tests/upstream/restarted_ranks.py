"""Run by torchrun: rank 1 kills itself after the first meeting; at the second one, rank 0 comes late.

With NAIVE=1 the ranks meet as torch does. Rank 1 writes the sum over both ranks into the file that is named.
"""

import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed

from qwenvl_ft.upstream.restarts import SHARED, meet_anew

rank, start = int(os.environ["RANK"]), os.environ["TORCHELASTIC_RESTART_COUNT"]
assert os.environ[SHARED] == "True", "vacuous: torchrun has no store for all starts"
if start == "1" and rank == 0:
    time.sleep(3)
if os.environ.get("NAIVE") != "1":
    meet_anew(timedelta(seconds=60))
    assert os.environ[SHARED] == "False"
distributed.init_process_group("gloo", timeout=timedelta(seconds=20))
total = torch.tensor(rank + 1)
distributed.all_reduce(total)
if start == "0" and rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
if start == "0":
    time.sleep(60)  # until torchrun stops it
if rank == 1:
    Path(sys.argv[1]).write_text(str(int(total)))
distributed.barrier()
distributed.destroy_process_group()
