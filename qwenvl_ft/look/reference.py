"""What would the encoder refuse? Asks its questions of a record without decoding pixels, also without a model.

Everyone who validates records asks here: ``check`` with and without a model, the check before training, and FLARE's
commands. Without a model, an encoder with Qwen3-VL's image rules and chat template answers; only its tokenizer is a
toy, so text is not counted.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from qwenvl_ft.data.conversation import Conversation, Image, Message, Text, Video
from qwenvl_ft.data.encode.by_recipe import build_encoder
from qwenvl_ft.data.encode.draft import Unsupervised
from qwenvl_ft.data.encode.encoder import Encoder
from qwenvl_ft.data.encode.labels import unsupervised
from qwenvl_ft.data.encode.show import template_message
from qwenvl_ft.data.encode.tokenise import require_unicode
from qwenvl_ft.data.media.grids import Grid, grid_of_size
from qwenvl_ft.data.media.high_bit_depth import HighBitDepthError
from qwenvl_ft.data.media.refused import TooLarge, TooThin
from qwenvl_ft.data.media.video import Clip, plan_clip
from qwenvl_ft.errors import DataError
from qwenvl_ft.look.sample import Case
from qwenvl_ft.model.processor import set_template_limits
from qwenvl_ft.model.tiny import make_processor, make_tokenizer
from qwenvl_ft.model.tiny_kinds import SIZES
from qwenvl_ft.recipe.schema import Recipe

RELEASED = {"min_pixels": 65_536, "max_pixels": 16_777_216, "max_video_pixels": 25_165_824}
"""Areas in the processors of the released Qwen3-VL models."""
NO_SUPERVISION = "no assistant turn is supervised"


def reference_processor() -> Any:
    """Return a processor with the rules of the released Qwen3-VL models and a toy tokenizer."""
    sizes = SIZES | RELEASED
    return make_processor(make_tokenizer(sizes["vocab_words"]), sizes)


def reference_encoder(recipe: Recipe) -> Encoder:
    """Build an encoder with the recipe's template and media rules for a recipe that names no model."""
    processor = reference_processor()
    set_template_limits(processor, recipe.template)
    return build_encoder(recipe, processor)


@dataclass
class MediaPlan:
    """The grids and clips of a conversation's media, or why there are none."""

    grids: list[Grid] = field(default_factory=list)
    clips: list[Clip] = field(default_factory=list)
    faults: list[Case] = field(default_factory=list)

    @property
    def patches(self) -> int:
        """Vision patches of all media."""
        return sum(t * h * w for t, h, w in self.grids + [clip.grid for clip in self.clips])


def plan_media(conversation: Conversation, sizes: Sequence[tuple[int, int]], encoder: Encoder) -> MediaPlan:
    """Plan the grid of each image and the frames of each video.

    Args:
        sizes: (width, height) of each image.
    """
    plan, processor, source = MediaPlan(), encoder.processor, conversation.source
    for image, (width, height) in zip(conversation.media(Image), sizes, strict=True):
        try:
            plan.grids.append(grid_of_size(image, height, width, processor.image_processor))
        except DataError as error:
            plan.faults.append((reason_of(error), str(error)))
    for video in conversation.media(Video):
        other = "encoding" if isinstance(video.value, (list, tuple)) else "corrupt"
        try:
            plan.clips.append(plan_clip(video, processor.video_processor, encoder.policy, source))
        except DataError as error:
            plan.faults.append((reason_of(error, other), str(error)))
    return plan


def text_cases(conversation: Conversation, plan: MediaPlan, encoder: Encoder) -> Iterator[Case]:
    """Yield why the encoder refuses a conversation whose media are sound."""
    try:
        if is_plain(conversation, encoder):
            require_plain_texts(conversation)
        else:
            encoder.require_sound(conversation, plan.grids, plan.clips)
    except Unsupervised:
        yield "unsupervised", NO_SUPERVISION
    except DataError as error:
        yield "encoding", str(error)


def is_plain(conversation: Conversation, encoder: Encoder) -> bool:
    """Return True if Qwen3-VL's chat template certainly shows all of a conversation: `require_plain_texts` is enough.

    Rendering would take three times as long as the rest of the check of a record without images.
    """
    first, *later = conversation.messages or (Message("", ()),)
    begins = first.role in ("system", "user", "assistant")
    known = all(message.role in ("user", "assistant") for message in later)
    shown = all(
        message.role == "user" or all(isinstance(part, Text) for part in message.content)
        for message in conversation.messages
    )
    tools = conversation.tools or encoder.tools or any(message.tool_calls for message in conversation.messages)
    return begins and known and shown and not tools


def require_plain_texts(conversation: Conversation) -> None:
    """Raise as `Encoder.require_sound` would for a plain conversation whose media are sound."""
    for message in conversation.messages:
        for part in template_message(message, conversation.source)["content"]:
            require_unicode(part.get("text", ""), conversation.source)
    if not any(message.role == "assistant" and message.loss is not False for message in conversation.messages):
        raise unsupervised(conversation.source, None)


def least_tokens_case(plan: MediaPlan, encoder: Encoder) -> Iterator[Case]:
    """Yield ``too_long`` if the media alone have more tokens than a sample may have."""
    limit, least = encoder.max_length, plan.patches // encoder.processor.image_processor.merge_size**2
    if limit is not None and least > limit and encoder.truncation_strategy not in ("left", "right"):
        yield "too_long", f"its media alone have {least} tokens, template.max_length is {limit}"


def reason_of(error: DataError, other: str = "corrupt") -> str:
    """Return the reason for an error about a medium; ``other`` if it has no reason of its own."""
    named = {TooThin: "too_thin", TooLarge: "too_large", HighBitDepthError: "high_bit_depth"}
    return next((reason for kind, reason in named.items() if isinstance(error, kind)), other)
