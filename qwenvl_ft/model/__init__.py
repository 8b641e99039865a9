"""The model: its anatomy, loading, attention over packed rows, and tiny checkpoints to test with."""
