"""``qwenvl-ft convert WHAT ...``: data sets in their own layout -> files that training reads."""

from importlib import import_module

from qwenvl_ft.errors import unknown_name

CONVERSIONS = {
    "flare": ("qwenvl_ft.flare.convert", "FLARE25's questions to training records"),
    "flare-validate": ("qwenvl_ft.flare.validate", "check what was converted"),
}
"""What -> the module with its ``main(argv, prog)``, and its line in the help."""


def convert(argv: list[str]) -> int:
    """Run a conversion with the rest of the command line.

    Raises:
        RecipeError: there is no such conversion.
    """
    if not argv or argv[0] in ("-h", "--help"):
        lines = [f"  {name:<16} {told}" for name, (_, told) in CONVERSIONS.items()]
        print("\n".join(["usage: qwenvl-ft convert WHAT [options]      qwenvl-ft convert WHAT --help", "", *lines]))
        return 0
    if argv[0] not in CONVERSIONS:
        raise unknown_name("conversion", argv[0], CONVERSIONS)
    module, _ = CONVERSIONS[argv[0]]
    return import_module(module).main(argv[1:], prog=f"qwenvl-ft convert {argv[0]}")
