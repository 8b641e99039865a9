"""A run as a document: what can be set, how files and flags add up to it, and what is said when they are wrong."""
