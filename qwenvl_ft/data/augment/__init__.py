"""Augmentation: pixels and coordinates move together, every random number is drawn before a pixel is read."""
