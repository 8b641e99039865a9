"""Makes servers render prompts as training did: by the chat template that is written, and the switches they set in it.

Training writes a video as the released models saw it, without vision tokens around it (data/encode/show.py). Since 5.10
the processors of transformers keep the pair that the released template writes there; 4.57 to 5.9 take a template with
or without it. So what is served gets a template without the pair, and training reads that one alike.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from qwenvl_ft.data.encode.draft import ENCLOSED_VIDEO, VIDEO_PAD
from qwenvl_ft.recipe.provenance import saved_recipe
from qwenvl_ft.upstream.processors import shows_videos
from qwenvl_ft.upstream.templates import render_with_tools

SYSTEM = """{%- if not messages or messages[0].role != 'system' %}
    {%- set messages = [{'role': 'system', 'content': SYSTEM_PROMPT}] + messages %}
{%- endif %}
"""
SWITCHES = {"enable_thinking": None, "add_vision_id": False}
"""Key of ``template`` in a recipe and variable of chat templates -> what all templates take it for if a server does not
set it; None if that differs."""
DOUBLE = (
    "a server with transformers 5.10 or later may show the model two vision tokens around a video that training never "
    "showed it"
)
VIDEO = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "?"}]}]


def with_system_prompt(template: str, system_prompt: str) -> str:
    """Return a chat template that begins conversations without a system message with this one."""
    return SYSTEM.replace("SYSTEM_PROMPT", json.dumps(system_prompt, ensure_ascii=False)) + template


def write_videos(processor: Any, *, pair: bool) -> list[str]:
    """Let a processor's chat template write videos with a pair of vision tokens around them, or without.

    Returns:
        A sentence for the user if the template writes them otherwise and could not be changed; otherwise nothing.
    """
    template = processor.chat_template
    if not isinstance(template, str) or not shows_videos(processor.video_processor):
        return []
    rendered = _rendered(processor, template)
    if rendered is not None and (VIDEO_PAD not in rendered or (ENCLOSED_VIDEO in rendered) == pair):
        return []
    bare = template.replace(ENCLOSED_VIDEO, VIDEO_PAD)
    changed = bare.replace(VIDEO_PAD, ENCLOSED_VIDEO) if pair else bare
    if changed != template:
        processor.chat_template = changed
        return []
    held, risk = (VIDEO_PAD, "SGLang may not find the videos of a prompt") if pair else (ENCLOSED_VIDEO, DOUBLE)
    return [f"The chat template was left as it is, because it does not hold {held} in one piece: {risk}."]


def switches_of(folder: Path, processor: Any) -> dict[str, bool]:
    """Return variable of the chat template -> its value in a training run, by the recipe beside its model.

    A variable is left out if the template does not have it, or if servers take it for that value anyway.
    """
    section = saved_recipe(folder).get("template") or {}
    known = [name for name in SWITCHES if name in section and name in str(processor.chat_template)]
    return {name: bool(section[name]) for name in known if section[name] != SWITCHES[name]}


def switches_flag(switches: dict[str, bool]) -> list[str]:
    """Return the words by which vLLM and SGLang render prompts as in training, unless a request says otherwise."""
    return ["--default-chat-template-kwargs", json.dumps(switches)] if switches else []


def _rendered(processor: Any, template: str) -> str | None:
    """Return a question about a video as text; None if the template raises an error."""
    try:
        return render_with_tools(processor.tokenizer, template, VIDEO, None, add_generation_prompt=True)
    except (TemplateError, TypeError, ValueError):
        return None
