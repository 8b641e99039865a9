"""Trained folders -> what is served: adapters merged, checkpoints looked into, weights in few bits."""
