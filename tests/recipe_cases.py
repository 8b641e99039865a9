"""Reads a key of a loaded recipe, for tests."""


def value_of(recipe, key):
    section, _, name = key.partition(".")
    values = getattr(recipe, section)
    return values.arguments[name] if section == "training" and name in values.arguments else getattr(values, name)
