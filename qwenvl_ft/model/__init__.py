"""Model code: names of parts, loading, attention over packed rows, adapters, and tiny checkpoints for tests."""
