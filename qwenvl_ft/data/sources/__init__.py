"""Records on disk: what a selection names, the files behind it, and which of their records a run takes."""
