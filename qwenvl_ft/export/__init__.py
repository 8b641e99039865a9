"""Prepares trained checkpoints for serving: merges adapters, quantises models, and inspects checkpoint folders."""
