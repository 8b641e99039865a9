"""Inspect data before training: is it sound (check), what does the model see (show), what does it contain (stats)?"""

FIRST = 1_000
"""Number of records of a stream that a command looks at by default."""
