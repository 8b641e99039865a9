"""Encodes a conversation as a sample: template text, tokens, labels, media, positions, pixels."""
