"""A conversation becomes a sample: template text, tokens, labels, media places, positions."""
