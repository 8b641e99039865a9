"""The commands of ``qwenvl-ft``, one module each. They are imported only when they run."""
