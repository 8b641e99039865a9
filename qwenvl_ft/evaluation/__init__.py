"""Evaluation by generation: a model answers prompts, and its answers are compared with the expected ones.

`metrics.METRICS` holds the metrics of one answer, which a recipe chooses from. `medical` and `localization` score a
whole set of answers; FLARE25 uses the former.
"""
