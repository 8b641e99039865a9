"""All code of this package that depends on other libraries' internals, one file for each dependency.

Internals are private names, replaced methods, and behaviour that depends on names. The rest of the package uses only
public interfaces of transformers, accelerate, peft, torch and the standard library, and the functions of this folder; a
test checks that. Each file's docstring states what it does, which internals it relies on, which versions have them in
which form, and what happens if they are missing. `probe.features` checks the installed versions.
"""
