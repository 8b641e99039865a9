"""Everything that this package borrows from other libraries beyond their public interfaces, one file for each thing.

Borrowed are private names, replaced methods, and behaviour that depends on names. The rest of the package uses only
public interfaces of transformers, accelerate, peft, torch and the standard library, and the functions of this folder; a
test checks that. The first lines of each file state what is borrowed, why, which versions have it in which form, and
what happens if it is missing. `probe.features` checks the installed versions.
"""
