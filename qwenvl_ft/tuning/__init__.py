"""Prepares a model for training: frozen parts, adapters, parameter groups and learning rates."""
