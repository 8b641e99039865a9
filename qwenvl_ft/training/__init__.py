"""The Trainer subclass (exact loss, planned rows, resumable runs), the checks before a run, and its logs."""

import qwenvl_ft.upstream.peft  # noqa: F401 - first: it keeps peft, which transformers imports, from importing bitsandbytes
