"""The `qwenvl-ft` command: one file per command."""
