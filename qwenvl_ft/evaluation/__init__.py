"""Evaluation by generation: a model answers prompts, and its answers are compared with the expected ones.

`metrics.METRICS` holds the metrics of a single answer that a recipe can choose. `medical` and `localization` score a
whole set of answers; FLARE25 uses the former.
"""
