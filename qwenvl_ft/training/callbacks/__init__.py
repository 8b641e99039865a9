"""What happens around a step: files and console, signals, early stopping."""
