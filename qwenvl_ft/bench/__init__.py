"""``qwenvl-ft bench``: measures or computes the time, memory and matrix work of the library's parts."""
