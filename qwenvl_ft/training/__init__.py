"""The Trainer subclass: exact loss, planned rows, resumable runs, and what it tells while it runs."""

import qwenvl_ft.upstream.peft  # noqa: F401 - transformers' trainer imports peft, and would import all that peft does
