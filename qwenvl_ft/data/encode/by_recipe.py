"""Builds the encoder that a recipe asks for, tools included."""

import json
from pathlib import Path
from typing import Any

from qwenvl_ft.data.encode.encoder import Encoder
from qwenvl_ft.data.media.images import MediaPolicy
from qwenvl_ft.data.media.patches import obstacle
from qwenvl_ft.errors import RecipeError
from qwenvl_ft.recipe.schema import Recipe

TOOL_FORMS = ("react_en", "react_zh", "qwen_en", "qwen_zh", "toolbench", "hermes", "default")
"""Names of ms-swift for ways of writing tools into the system prompt; their text is not ours to render."""


def build_encoder(recipe: Recipe, processor: Any) -> Encoder:
    """Build the encoder of a recipe's template and media rules.

    Raises:
        RecipeError: ``template.tools_prompt`` is not a JSON list of function schemas.
    """
    template = recipe.template
    return Encoder(
        processor,
        max_length=template.max_length,
        truncation_strategy=template.truncation_strategy,
        system_prompt=template.system_prompt,
        tools=read_tools(template.tools_prompt) if template.tools_prompt else None,
        add_vision_id=template.add_vision_id,
        policy=MediaPolicy.of(recipe.data),
        raw_pixels=not obstacle(processor.image_processor),
    )


def read_tools(tools_prompt: str) -> list[dict[str, Any]]:
    """Return the function schemas of ``template.tools_prompt``: JSON, or the name of a ``.json`` file.

    Raises:
        RecipeError: the file cannot be read; it is not a list of schemas; or it is one of `TOOL_FORMS`, which the
            model's own chat template does not use.
    """
    text = tools_prompt
    if tools_prompt.endswith(".json"):
        try:
            text = Path(tools_prompt).expanduser().read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"template.tools_prompt: {tools_prompt} cannot be read: {error}.") from None
    try:
        tools = json.loads(text)
    except ValueError:
        tools = None
    if isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools):
        return tools
    if tools_prompt in TOOL_FORMS:
        raise RecipeError(
            f"template.tools_prompt={tools_prompt} is a form of tool prompts, but a Qwen-VL model is trained in the "
            "form of its own chat template. Remove the key, add 'tools' to the records, or give schemas here."
        )
    raise RecipeError(
        f"template.tools_prompt={tools_prompt!r:.200} is not a JSON list of function schemas, nor a .json file with "
        'one. Example: \'[{"type": "function", "function": {"name": "measure", "parameters": {}}}]\'.'
    )
