"""Augmentation: pixels and coordinates move together; all random numbers are drawn before any pixel is read."""
