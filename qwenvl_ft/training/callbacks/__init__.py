"""Callbacks of the training loop: log files and console, signals, early stopping, tuning methods."""
