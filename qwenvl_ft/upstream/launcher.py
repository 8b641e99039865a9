"""Says whether accelerate or torchrun started this process; both print a traceback of their own after a failure. Lets
only one of the processes that they started on a node print an error that all of them have.

Relies on environment variables: ``TORCHELASTIC_RUN_ID`` of torchrun and of accelerate with several processes, torch 2.8
to 2.14, documented; ``ACCELERATE_DYNAMO_BACKEND``, which ``accelerate launch`` sets for a single process, accelerate
1.0 to 1.15, not documented. `launched` must be asked before transformers' TrainingArguments, which set variables of
accelerate too. If a variable is missing, a user's error is printed as in a process without a launcher.

accelerate's configuration file and flags also reach a process as variables (``ACCELERATE_*``, ``FSDP_*`` and
``PARALLELISM_CONFIG_*``, accelerate 1.0 to 1.15), which accelerate reads wherever TrainingArguments leave something
open. If one is missing or renamed, what it set is not compared with the recipe.

``TORCHELASTIC_ERROR_FILE`` of torchrun and accelerate, torch 2.8 to 2.15: the path of a file for the exception of this
process, in a folder named by its local rank within a temporary folder of the node's processes and of this (re)start.
Without it, each process prints the error.
"""

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

VARIABLES = ("TORCHELASTIC_RUN_ID", "ACCELERATE_DYNAMO_BACKEND")
COMPILING = ("ACCELERATE_DYNAMO_BACKEND", "ACCELERATE_DYNAMO_MODE")
"""Variables by which accelerate compiles the whole model. Some versions of TrainingArguments set them too."""


def launched(environment: Mapping[str, str] | None = None) -> bool:
    """Return True if a launcher waits for this process and will report its exit code."""
    environment = os.environ if environment is None else environment
    return any(name in environment for name in VARIABLES)


def launcher_precision() -> str:
    """Return the mixed precision that accelerate's configuration sets: ``no``, ``bf16``, ``fp16`` or ``fp8``."""
    return os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()


def launcher_shards() -> str | None:
    """Return ``FSDP`` or ``DeepSpeed`` if accelerate's configuration shards the model by it."""
    names = {"ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_DEEPSPEED": "DeepSpeed"}
    return next((shards for name, shards in names.items() if _is_on(name)), None)


def launcher_fsdp_version() -> str:
    """Return the version of FSDP in accelerate's configuration; 1 is what accelerate takes without one."""
    return os.environ.get("FSDP_VERSION") or "1"


def launcher_recomputes() -> bool:
    """Return True if accelerate's configuration has ``fsdp_activation_checkpointing``."""
    return launcher_shards() == "FSDP" and _is_on("FSDP_ACTIVATION_CHECKPOINTING")


def launcher_compiles() -> str | None:
    """Return the backend that accelerate's configuration compiles the model by, if any."""
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    return None if backend == "no" else backend


def launcher_mesh_size(dimension: str) -> int:
    """Return the size of a dimension of accelerate's mesh (``tp``, ``cp`` or ``sp``) that its configuration sets."""
    return int(os.environ.get(mesh_variable(dimension)) or 1) if _is_on("ACCELERATE_USE_PARALLELISM_CONFIG") else 1


def mesh_variable(dimension: str) -> str:
    """Return the variable that holds the size of a dimension of accelerate's mesh."""
    return f"PARALLELISM_CONFIG_{dimension.upper()}_SIZE"


@contextmanager
def compiling_as_launched() -> Iterator[None]:
    """Restore `COMPILING` at the end of the context, so that they are the launcher's, not those of an earlier run."""
    before = {name: os.environ[name] for name in COMPILING if name in os.environ}
    try:
        yield
    finally:
        for name in COMPILING:
            os.environ.pop(name, None)
        os.environ.update(before)


def _is_on(name: str) -> bool:
    return os.environ.get(name, "false").lower() == "true"


def is_first_to_say(text: str) -> bool:
    """Return True if no other process of this node and this start has asked the same for the same text before.

    A file that only one process can create marks what was said: the processes may have failed before they could talk
    to each other, and the rank that fails is not always rank 0.
    """
    folder = Path(os.environ.get("TORCHELASTIC_ERROR_FILE") or ".").parent
    if folder.name != os.environ.get("LOCAL_RANK"):
        return True
    mark = folder.parent / f"said-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    try:
        mark.touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:  # no such folder, or it is not writable
        return True
    return True
