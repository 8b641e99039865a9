"""Says whether accelerate or torchrun started this process; both print a traceback of their own after a failure.

Relies on environment variables: ``TORCHELASTIC_RUN_ID`` of torchrun and of accelerate with several processes, torch 2.8
to 2.14, documented; ``ACCELERATE_DYNAMO_BACKEND``, which ``accelerate launch`` sets for a single process, accelerate
1.0 to 1.15, not documented. `launched` must be asked before transformers' TrainingArguments, which set variables of
accelerate too. If a variable is missing, a user's error is printed as in a process without a launcher.
"""

import os
from collections.abc import Mapping

VARIABLES = ("TORCHELASTIC_RUN_ID", "ACCELERATE_DYNAMO_BACKEND")


def launched(environment: Mapping[str, str] | None = None) -> bool:
    """Return True if a launcher waits for this process and will report its exit code."""
    environment = os.environ if environment is None else environment
    return any(name in environment for name in VARIABLES)
