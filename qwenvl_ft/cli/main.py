"""Entry point of ``qwenvl-ft``. Imports the module of a command only when it runs, so that help is instant."""

import sys
from importlib import import_module

from qwenvl_ft import __version__
from qwenvl_ft.errors import QwenVLError, unknown_name
from qwenvl_ft.upstream.quiet import without_notices

COMMANDS = {
    "train": "train with a recipe: qwenvl-ft train recipe=NAME section.key=value ...",
    "check": "check every record before training: qwenvl-ft check RECIPE or FILE ...",
    "show": "write an HTML page of what the model will see: images, objects, tokens, packed rows",
    "stats": "print statistics of the data: lengths, images, answers, objects, diversity",
    "split": "split dense captions by number of objects, for a curriculum from few objects to many",
    "monitor": "show the progress of a run: loss, speed, time left, GPUs",
    "recipe": "print a resolved recipe, and the file that set each value",
    "convert": "convert datasets with a layout of their own to training files: qwenvl-ft convert flare ...",
    "infer": "ask a model about images",
    "score": "score a file of answers: qwenvl-ft score --metric NAME --data FILE [--answers FILE]",
    "merge": "merge an adapter into its base model, for serving",
    "export": "write what vLLM, SGLang, peft or transformers take, and the command that serves it",
    "serve-check": "compare the answers of a server with those of the trained model, token by token",
    "prove": "test the promises on your model and data: packed = alone, losses, frozen and saved weights",
    "inspect": "print the contents of a checkpoint: method, weights by part, ranks, sizes",
    "doctor": "report what this machine can train with",
    "bench": "measure data loading, training step, loss, attention; calibrate the planner for this machine",
    "tiny": "write a complete tiny checkpoint of the real architecture, for tests and first steps",
}
"""Command -> its line in the help. It is the function NAME in ``qwenvl_ft/cli/NAME.py``, with ``_`` for ``-``."""

FLAGS_PASS = ("recipe", "check", "show", "stats", "prove")
"""Commands that take the flags of recipes besides their own options."""
OWN_OPTIONS = ("convert", "bench")
"""Commands whose function takes the remaining arguments and returns the exit code."""


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit code: 2 for a user's error, which is printed as one line."""
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
    except SystemExit as ending:  # help was shown, or typer has reported wrong options
        return ending.code if isinstance(ending.code, int) else 1
    except KeyboardInterrupt:
        return 130


def run(name: str, rest: list[str]) -> int:
    """Run the function of a command; typer parses its options from the command line."""
    if name == "train":
        from qwenvl_ft.train import main as train

        return train(rest)
    function_name = name.replace("-", "_")
    function = getattr(import_module(f"qwenvl_ft.cli.{function_name}"), function_name)
    if name in OWN_OPTIONS:
        return function(rest)
    import typer

    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    settings = {"ignore_unknown_options": name in FLAGS_PASS}
    app.command(name, help=COMMANDS[name], context_settings=settings)(function)
    with without_notices():
        app(args=rest, prog_name=f"qwenvl-ft {name}")
    return 0


def help_text() -> str:
    """Return the help: one line per command."""
    lines = [f"  {name:<11} {line}" for name, line in COMMANDS.items()]
    return "\n".join(
        [
            "Fine-tune Qwen3-VL.",
            "",
            "usage: qwenvl-ft COMMAND [options]      qwenvl-ft COMMAND --help",
            "",
            *lines,
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
