"""Evaluation: a model answers prompts, and its answers are compared with the expected ones.

`metrics.METRICS` names the metrics that a recipe and `qwenvl-ft score` can choose. `medical` and `localization` compute
most of them; FLARE25 uses those of `medical`.
"""
