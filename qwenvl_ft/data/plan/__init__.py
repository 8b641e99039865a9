"""Plans an epoch: the length of each sample, which samples share a row, and which rank trains the row."""
