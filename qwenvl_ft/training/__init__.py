"""The Trainer subclass: exact loss, planned rows, resumable runs, and what it tells while it runs."""
