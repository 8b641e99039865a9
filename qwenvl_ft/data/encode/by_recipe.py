"""Builds the encoder that a recipe asks for, tools included."""

from typing import Any

from qwenvl_ft.data.encode.encoder import Encoder
from qwenvl_ft.data.encode.tools_prompt import read_tools
from qwenvl_ft.data.media.images import MediaPolicy
from qwenvl_ft.data.media.patches import obstacle
from qwenvl_ft.recipe.schema import Recipe


def build_encoder(recipe: Recipe, processor: Any) -> Encoder:
    """Build the encoder of a recipe's template and media rules.

    Raises:
        RecipeError: ``template.tools_prompt`` is not made of function schemas.
    """
    template = recipe.template
    return Encoder(
        processor,
        max_length=template.max_length,
        truncation_strategy=template.truncation_strategy,
        system_prompt=template.system_prompt,
        tools=read_tools(template.tools_prompt) if template.tools_prompt else None,
        add_vision_id=template.add_vision_id,
        enable_thinking=template.enable_thinking,
        policy=MediaPolicy.of(recipe.data),
        max_record_bytes=recipe.data.max_record_bytes,
        raw_pixels=not obstacle(processor.image_processor),
    )
