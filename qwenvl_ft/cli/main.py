"""`qwenvl-ft COMMAND ...`: finds the command's file when it is asked for, so that help is instant."""

import sys
from importlib import import_module

from qwenvl_ft import __version__
from qwenvl_ft.errors import QwenVLError, unknown_name

COMMANDS = {
    "train": "train a recipe: qwenvl-ft train recipe=NAME section.key=value ...",
    "check": "look at every record before training does: qwenvl-ft check RECIPE or FILE ...",
    "show": "write a page of what the model will see: images, objects, tokens, packed rows",
    "stats": "count what is in the data: lengths, images, answers, objects, how varied they are",
    "split": "part dense captions by how many objects they have, for training from the simple to the full",
    "monitor": "show where a run stands: progress, loss, speed, time left, GPUs",
    "recipe": "print what a recipe resolves to, and which file each value came from",
    "convert": "make training files of data in a layout of its own: qwenvl-ft convert flare ...",
    "infer": "ask a model about images",
    "merge": "make one model of an adapter and its base, for serving",
    "prove": "prove the promises on your model and data: packed = alone, losses, frozen bits, saved weights",
    "inspect": "say what a checkpoint holds: method, weights by part, ranks, sizes",
    "doctor": "say whether this machine can train, and what with",
    "bench": "measure data path, training step, loss, attention; fit the planner to this machine",
    "tiny": "make a complete tiny checkpoint of the real architecture, for tests and first steps",
}
"""Command -> its line in the help. Each is a function of its own name in ``qwenvl_ft/cli/NAME.py``."""

FLAGS_PASS = ("recipe", "check", "show", "stats", "prove")
"""Commands that take the flags of recipes beside their own options."""
OWN_OPTIONS = ("convert", "bench")
"""Commands whose function takes the words behind its name and returns the exit code."""


def main(argv: list[str] | None = None) -> int:
    """Run a command; a user's error is one line and exit code 2."""
    words = sys.argv[1:] if argv is None else argv
    if not words or words[0] in ("-h", "--help", "help"):
        print(help_text())
        return 0
    if words[0] in ("-V", "--version"):
        print(f"qwenvl-ft {__version__}")
        return 0
    name, rest = words[0], words[1:]
    try:
        if name not in COMMANDS:
            raise unknown_name("command", name, COMMANDS)
        return run(name, rest)
    except QwenVLError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except SystemExit as ending:  # help was shown, or typer has said what is wrong with the options
        return ending.code if isinstance(ending.code, int) else 1
    except KeyboardInterrupt:
        return 130


def run(name: str, rest: list[str]) -> int:
    """A command's function, its options from the command line by typer."""
    if name == "train":
        from qwenvl_ft.train import main as train

        return train(rest)
    function = getattr(import_module(f"qwenvl_ft.cli.{name}"), name)
    if name in OWN_OPTIONS:
        return function(rest)
    import typer

    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    settings = {"ignore_unknown_options": name in FLAGS_PASS}
    app.command(name, help=COMMANDS[name], context_settings=settings)(function)
    app(args=rest, prog_name=f"qwenvl-ft {name}")
    return 0


def help_text() -> str:
    """All commands, a line each."""
    lines = [f"  {name:<8} {told}" for name, told in COMMANDS.items()]
    return "\n".join(
        [
            "Fine-tune Qwen3-VL, exactly.",
            "",
            "usage: qwenvl-ft COMMAND [options]      qwenvl-ft COMMAND --help",
            "",
            *lines,
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
