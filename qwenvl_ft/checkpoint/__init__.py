"""Checkpoints to resume from: which one is complete, and whether it belongs to this run."""
