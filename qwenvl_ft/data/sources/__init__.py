"""Records on disk: parse a selection of data sets, open their files, and choose which records a run uses."""
