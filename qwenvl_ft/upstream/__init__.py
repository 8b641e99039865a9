"""Everything that is borrowed from other libraries: private names, replaced methods, tricks by name; a file for each.

The rest of the package uses only the public interfaces of transformers, accelerate, peft, torch and the standard
library, and what this folder offers under names of its own; a test checks it. The first lines of each file say what is
borrowed, why, which versions have it in which shape, and what happens where it is missing. `probe.FEATURES` asks the
installed versions.
"""
