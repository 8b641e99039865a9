"""From records on disk to one flat row of tensors; README.md in this folder walks the path."""
