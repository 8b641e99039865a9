"""Where do two answers differ, and how do two prompts? Both are lists of tokens."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Any

from qwenvl_ft.data.encode.draft import ENCLOSED_VIDEO, IMAGE_PAD, VIDEO_PAD, VISION_END, VISION_START

PADS = {IMAGE_PAD: "images", VIDEO_PAD: "videos"}
GROUP = re.compile(rf"<(\d+\.\d) seconds>{re.escape(ENCLOSED_VIDEO)}")
"""A group of frames in a prompt whose pads are not repeated, with its time in seconds."""


def first_difference(ours: Sequence[int], theirs: Sequence[int], stops: set[int]) -> int | None:
    """Return the place of the first token that differs; all stop tokens are the same one.

    Example:
        ``[5, 6, 7]`` and ``[5, 8]`` differ at 1; ``[5]`` and ``[5, 6]`` at 1.
    """
    for place, (own, other) in enumerate(zip(ours, theirs, strict=False)):
        if own != other and not (own in stops and other in stops):
            return place
    return None if len(ours) == len(theirs) else min(len(ours), len(theirs))


def prompt_difference(ours: list[int], theirs: list[int] | None, count: int | None, tokenizer: Any) -> str:
    """Return how the prompt that the server has rendered differs from the trained model's; empty if it does not.

    Args:
        ours: tokens of the trained model's prompt.
        theirs: tokens of the server's; None if it does not say them.
        count: number of the server's tokens with all pads; None if it does not say that.
    """
    if theirs is None:
        if count is None or count == len(ours):
            return ""
        return (
            f"the server's prompt has {count} tokens, the trained model's {len(ours)}: it has other pixel limits, "
            "another chat template, another system prompt or other frames of a video"
        )
    pads = {tokenizer.convert_tokens_to_ids(pad): name for pad, name in PADS.items()}
    own_text, other_text = _without_repeats(ours, pads), _without_repeats(theirs, pads)
    if own_text != other_text:
        place = first_difference(own_text, other_text, set()) or 0
        own, other = (repr(tokenizer.decode(text[place : place + 8])) for text in (own_text, other_text))
        return _frame_difference(tokenizer.decode(own_text), tokenizer.decode(other_text)) or (
            f"the server renders another prompt (chat template, or the system prompt of training): {other} where the "
            f"trained model has {own}"
        )
    for pad, name in pads.items() if count != len(ours) else ():
        own_count, other_count = ours.count(pad), theirs.count(pad)
        if own_count != other_count:
            return f"the server has other pixel limits: {other_count} tokens of {name}, not {own_count}"
    return ""


def _frame_difference(own: str, other: str) -> str:
    """Return how two prompts differ if only the times or the number of their groups of frames do; else an empty text.

    Args:
        own, other: without repeated pads.
    """
    inner = re.sub(f"{re.escape(VISION_START)}((?:{GROUP.pattern})+){re.escape(VISION_END)}", r"\1", other)
    if inner == own:
        return (
            "the server writes a second pair of vision tokens around each video, as transformers does since 5.10: use "
            "the chat template of qwenvl-ft export --for vllm"
        )
    if GROUP.sub("", inner) != GROUP.sub("", own):
        return ""
    times, others = GROUP.findall(own), GROUP.findall(inner)
    if times == others:  # in other places
        return ""
    shown = ", ".join(f"{time} s" for time in others[:4]), ", ".join(f"{time} s" for time in times[:4])
    return (
        f"the server shows other frames of a video, or at other times: {len(others)} groups at {shown[0]}, where the "
        f"trained model has {len(times)} at {shown[1]}"
    )


def _without_repeats(tokens: list[int], pads: Collection[int]) -> list[int]:
    before = [-1, *tokens]
    return [token for token, last in zip(tokens, before, strict=False) if token != last or token not in pads]
