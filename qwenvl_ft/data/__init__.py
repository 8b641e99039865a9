"""Turns records on disk into batches of one flat row; README.md in this folder follows a record through it."""
