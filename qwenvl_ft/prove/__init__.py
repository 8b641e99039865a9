"""Proof of the promises on the user's own model, data, versions and device: ``qwenvl-ft prove``."""
