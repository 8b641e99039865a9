"""The ranks of a run: joining them before the model is loaded, comparing what they see, and leaving together."""

import os
import socket
from typing import TypeVar, cast

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import TrainingArguments

from qwenvl_ft.checkpoint.manifest import are_joined
from qwenvl_ft.data.plan.dataset import SampleDataset
from qwenvl_ft.errors import DataError, RecipeError
from qwenvl_ft.upstream.launcher import launcher_shards
from qwenvl_ft.upstream.processes import shard_on_cpu

Value = TypeVar("Value")


def set_single_rank() -> None:
    """Set torch's environment variables for one rank if no launcher has set them: DeepSpeed would look for MPI."""
    if "WORLD_SIZE" in os.environ:
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))


def join_ranks(args: TrainingArguments) -> None:
    """Make sure that all launched processes are ranks of one run, before the model is loaded.

    On a CPU transformers joins them only if ``use_cpu`` is set. DeepSpeed shards the model while it is loaded and
    ignores a process group that it did not create. In both cases each process would train alone on all the data.

    Raises:
        RecipeError: the launcher started more processes than the run has ranks.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != args.world_size:
        raise RecipeError(
            f"the launcher started {started} processes, but this run sees {args.world_size}: each would train alone. "
            "Launch with torchrun or accelerate on devices of one kind, or set training.use_cpu=true."
        )
    if args.fsdp or launcher_shards() == "FSDP":
        shard_on_cpu()
    if args.deepspeed is not None and torch.distributed.is_initialized():
        import deepspeed

        deepspeed.init_distributed(dist_backend=torch.distributed.get_backend())


def leave_ranks() -> None:
    """Wait for the slowest rank, then leave the process group; leaving early would break the others' connections."""
    if are_joined():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def broadcast_from_rank_0(value: Value, world_size: int) -> Value:
    """Return rank 0's value on every rank, for inputs of the plan that may differ between machines."""
    if world_size == 1:
        return value
    values = [value]
    torch.distributed.broadcast_object_list(values, src=0)
    return values[0]


def sum_over_ranks(value: Tensor, accelerator: Accelerator) -> Tensor:
    """Return the sum of a tensor over all ranks, on every rank."""
    return cast(Tensor, accelerator.reduce(value, reduction="sum")) if accelerator.num_processes > 1 else value


def require_same_samples(dataset: SampleDataset, epoch: int, world_size: int) -> None:
    """Raise on every rank if the ranks see different samples: their plans would differ and the run would hang.

    Raises:
        DataError: names two ranks and the number of samples that each sees.
    """
    if world_size == 1:
        return
    own = dataset.at(epoch).key()
    keys = [own] * world_size
    torch.distributed.all_gather_object(keys, own)
    other = next((rank for rank in range(world_size) if keys[rank] != keys[0]), None)
    if other is not None:
        count, other_count = keys[0].samples, keys[other].samples
        raise DataError(
            f"{dataset.name}: rank 0 sees {count:,} samples but rank {other} sees {other_count:,}"
            + (", with different lengths" if count == other_count else "")
            + ". Check that every machine has the same data and media files."
        )
