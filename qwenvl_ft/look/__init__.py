"""Looking at data before training: is it sound (check), what does the model see (show), what is in it (stats)."""
