"""The plan of an epoch: how long each sample is, which samples share a row, and which rank trains it."""
