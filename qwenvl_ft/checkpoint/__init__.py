"""Finds the checkpoint to resume from and checks that it is complete and belongs to this run."""
