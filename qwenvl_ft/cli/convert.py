"""``qwenvl-ft convert NAME ...``: converts datasets with a layout of their own to files that training reads."""

from importlib import import_module

from qwenvl_ft.errors import unknown_name

CONVERSIONS = {
    "flare": ("qwenvl_ft.flare.convert", "convert the questions of FLARE25 to training records"),
    "flare-validate": ("qwenvl_ft.flare.validate", "check the converted records"),
}
"""Name -> module with ``main(argv, prog)``, and the line in the help."""


def convert(argv: list[str]) -> int:
    """Run a conversion with the remaining arguments.

    Raises:
        RecipeError: the conversion is unknown.
    """
    if not argv or argv[0] in ("-h", "--help"):
        lines = [f"  {name:<16} {line}" for name, (_, line) in CONVERSIONS.items()]
        print("\n".join(["usage: qwenvl-ft convert NAME [options]      qwenvl-ft convert NAME --help", "", *lines]))
        return 0
    if argv[0] not in CONVERSIONS:
        raise unknown_name("conversion", argv[0], CONVERSIONS)
    module, _ = CONVERSIONS[argv[0]]
    return import_module(module).main(argv[1:], prog=f"qwenvl-ft convert {argv[0]}")
