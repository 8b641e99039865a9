"""Evaluation by generation: a model answers prompts, and its answers are compared with the expected ones."""
