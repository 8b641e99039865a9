"""Dense captioning: groups of records with objects become questions with JSON answers.

A group's conversation is a function of (seed, epoch, group) alone.
"""
