"""Reads the function schemas of ``template.tools_prompt``: a list or an object, as YAML, JSON text or a file."""

import json
from pathlib import Path
from typing import Any

from qwenvl_ft.data.encode.show import function_name
from qwenvl_ft.errors import RecipeError

TOOL_FORMS = ("react_en", "react_zh", "qwen_en", "qwen_zh", "toolbench", "hermes", "default")
"""Names of ms-swift for ways of writing tools into the system prompt; their text is not ours to render."""
EXAMPLE = '\'[{"type": "function", "function": {"name": "measure", "parameters": {}}}]\''


def read_tools(tools_prompt: str | list[Any], key: str = "template.tools_prompt") -> list[dict[str, Any]]:
    """Return the function schemas.

    Args:
        tools_prompt: a list of schemas, its JSON text, one schema as JSON text, or the name of a .json file with
            either or of a .jsonl file with one schema per line.
        key: recipe key or flag, for messages.

    Raises:
        RecipeError: the file cannot be read; a schema has no name, or parameters that are no JSON schema; or it is one
            of `TOOL_FORMS`, which the model's own chat template does not use.
    """
    if isinstance(tools_prompt, str) and tools_prompt in TOOL_FORMS:
        raise RecipeError(
            f"{key}={tools_prompt} is a form of tool prompts, but a Qwen-VL model is trained in the "
            "form of its own chat template. Remove the key, add 'tools' to the records, or give schemas here."
        )
    tools = _parsed(tools_prompt, key) if isinstance(tools_prompt, str) else tools_prompt
    tools = [tools] if isinstance(tools, dict) else tools
    if not isinstance(tools, list):
        raise RecipeError(
            f"{key}={tools_prompt!r:.200} is not a JSON list of function schemas, nor a .json file with one. "
            f"Example: {EXAMPLE}."
        )
    for number, tool in enumerate(tools, start=1):
        if fault := _fault(tool):
            raise RecipeError(f"{key}: schema {number} of {len(tools)} {fault}: {tool!r:.120}. Example: {EXAMPLE}.")
    return tools


def _parsed(tools_prompt: str, key: str) -> Any:
    """Return the JSON in a text or file; None if it is no JSON."""
    text, lines = tools_prompt, False
    if tools_prompt.endswith((".json", ".jsonl")):
        lines = tools_prompt.endswith(".jsonl")
        try:
            text = Path(tools_prompt).expanduser().read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"{key}: {tools_prompt} cannot be read: {error}.") from None
    try:
        return [json.loads(line) for line in text.splitlines() if line.strip()] if lines else json.loads(text)
    except ValueError:
        return None


def _fault(tool: Any) -> str:
    """Return what is wrong with a function schema, or nothing."""
    if not isinstance(tool, dict) or not function_name(tool):
        return "has no function name"
    inner = tool["function"] if isinstance(tool.get("function"), dict) else tool
    parameters = inner.get("parameters", {})
    if not isinstance(parameters, dict):
        return "has parameters that are no JSON schema"
    if parameters and parameters.get("type", "object") != "object":
        return "has parameters of another type than object"
    return ""
