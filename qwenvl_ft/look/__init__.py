"""Inspect data before training: is it sound (check), what does the model see (show), what does it contain (stats)?"""
