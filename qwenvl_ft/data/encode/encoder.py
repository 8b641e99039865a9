"""Encodes a conversation as a sample, or computes the sample's exact length without decoding a pixel.

The steps, one per file: render the chat template (show.py), tokenise (tokenise.py), find the supervised
tokens (labels.py) and the media (places.py). The result is a `Draft` (draft.py); its length is the sample's. Its
tokens and positions (expand.py) and pixels (pixels.py) make it a sample. Letters in shapes: D draft tokens, L tokens.
"""

import hashlib
import json
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import transformers
from numpy.typing import NDArray

from qwenvl_ft.data.conversation import Conversation, Image, Message, Sample, Source, Text, Video
from qwenvl_ft.data.encode.draft import IMAGE_PAD, STRATEGIES, VIDEO_PAD, Draft, Extent, cut, too_long
from qwenvl_ft.data.encode.expand import expand
from qwenvl_ft.data.encode.fingerprint import tokenizer_fingerprint
from qwenvl_ft.data.encode.labels import (
    Span,
    find_turns,
    require_supervised,
    supervised_spans,
    supervised_tokens,
    token_weights,
    unsupervised,
    weights_of,
)
from qwenvl_ft.data.encode.part import part_of
from qwenvl_ft.data.encode.pixels import image_grids_in_time, media_pixels
from qwenvl_ft.data.encode.places import MediaTokens, not_rendered
from qwenvl_ft.data.encode.show import ChatTemplate, refuse_control, require_tools_shown, write_times
from qwenvl_ft.data.encode.tokenise import TextTokenizer, require_unicode
from qwenvl_ft.data.media.frames import named_frames
from qwenvl_ft.data.media.grids import Grid, grid_and_frames
from qwenvl_ft.data.media.images import MediaPolicy
from qwenvl_ft.data.media.reading import saved_reading, without_reading
from qwenvl_ft.data.media.video import Clip, plan_clip
from qwenvl_ft.data.readers import read_record
from qwenvl_ft.data.record_size import too_large, utf8_bytes
from qwenvl_ft.errors import DataError, RecipeError, unknown_name
from qwenvl_ft.recipe.schema import DataConfig
from qwenvl_ft.upstream.processors import require_known_rule


class _Shown(NamedTuple):
    """A rendered conversation and its media."""

    text: str
    supervised: list[Span]
    weights: list[float]
    """Of each supervised span."""
    images: list[Image]
    image_grids: list[Grid]
    videos: list[Video]
    clips: list[Clip]
    several_frames: tuple[str, ...]
    """As in `Extent`; empty if the grids were known."""


def _image_headers(
    images: list[Image], processor: Any, policy: MediaPolicy, source: Source
) -> tuple[list[Grid], tuple[str, ...]]:
    """Return the images' grids, and those of several frames as in `Extent`."""
    seen = [grid_and_frames(image, processor, policy, source) for image in images]
    several = named_frames((image.value for image in images), (count for _, count in seen), policy)
    return [grid for grid, _ in seen], several


def _counted(shown: _Shown, processor: Any, tokenizer: TextTokenizer, source: Source) -> tuple[int, int] | None:
    """Return the tokens and patches of a conversation; None if its media or turns are not all shown as they should."""
    media = (
        (IMAGE_PAD, processor.image_processor.merge_size, shown.image_grids),
        (VIDEO_PAD, processor.video_processor.merge_size, [clip.grid for clip in shown.clips]),
    )
    whole = all(shown.text.count(pad) == sum(t for t, _, _ in grids) for pad, _, grids in media)
    if not (whole and shown.supervised):
        return None
    tokens = tokenizer.count(shown.text, source)
    tokens += sum(t * (h * w // merge**2 - 1) for _, merge, grids in media for t, h, w in grids)
    return tokens, sum(t * h * w for _, _, grids in media for t, h, w in grids)


def without_answer(conversation: Conversation) -> Conversation:
    """Return a conversation without its last assistant turn, if it ends with one.

    Raises:
        DataError: nothing precedes the answer.
    """
    messages = conversation.messages
    if messages[-1].role == "assistant":
        messages = messages[:-1]
    if not messages:
        raise DataError(f"{conversation.source}: no message precedes the answer, so there is no prompt.")
    return Conversation(messages, conversation.source, conversation.tools)


class Encoder:
    """Encodes records as samples: tokens of the processor's own chat template, labels, positions, pixels.

    Args:
        processor: a Qwen2-VL, Qwen2.5-VL or Qwen3-VL processor.
        max_length: maximum number of tokens of a sample; None for no limit.
        truncation_strategy: handling of longer samples. ``raise`` and ``delete`` raise `TooLong` (planning counts the
            deleted ones); ``right`` and ``left`` cut tokens off that end, never through an image or a video.
        system_prompt: used for conversations without a system message.
        tools: function schemas, used for conversations without tools.
        add_vision_id: let the template number the media ("Picture 1: ").
        enable_thinking: passed to the template; templates of thinking models end a prompt with an empty think block if
            it is false, as the answers of records without reasoning begin.
        policy: limits on the media that may be opened, and how images are read; None takes the reading that was saved
            with the processor.
        max_record_bytes: a conversation with more text is refused before it is tokenised.
        turn_weights: apply the ``loss_weight`` of turns; False takes all as 1.
        raw_pixels: return images as raw patches (data/media/patches.py); the model must have been prepared with
            `use_raw_patches`.

    Raises:
        RecipeError: an unknown strategy, a control token in the system prompt or the tools, or a transformers version
            whose processors resize by an unknown rule.
    """

    def __init__(
        self,
        processor: Any,
        *,
        max_length: int | None = None,
        truncation_strategy: str = "raise",
        system_prompt: str | None = None,
        tools: list[dict[str, Any]] | None = None,
        add_vision_id: bool = False,
        enable_thinking: bool = False,
        policy: MediaPolicy | None = None,
        raw_pixels: bool = False,
        turn_weights: bool = True,
        max_record_bytes: int = DataConfig.max_record_bytes,
    ) -> None:
        if truncation_strategy not in STRATEGIES:
            raise unknown_name("template.truncation_strategy", truncation_strategy, STRATEGIES)
        try:
            refuse_control(system_prompt or "", "template.system_prompt")
            refuse_control(tools or [], "template.tools_prompt")
        except DataError as error:
            raise RecipeError(str(error)) from None
        self.processor = processor
        self.max_length = max_length
        self.truncation_strategy = truncation_strategy
        self.system_prompt = system_prompt
        self.tools = tools
        self.add_vision_id = add_vision_id
        self.enable_thinking = enable_thinking
        self.policy = policy or MediaPolicy(reading=saved_reading(processor))
        self.raw_pixels = raw_pixels
        self.turn_weights = turn_weights
        self.max_record_bytes = max_record_bytes
        self._template = ChatTemplate(processor.tokenizer, processor.chat_template or processor.tokenizer.chat_template)
        self._tokenizer = TextTokenizer(processor.tokenizer.backend_tokenizer)
        self._media_tokens = MediaTokens(processor)
        require_known_rule(processor)

    def __call__(self, record: dict[str, Any] | Conversation, media_root: str | None = None) -> Sample:
        """Encode a record for training.

        Args:
            media_root: folder of relative media paths.

        Raises:
            DataError: the record is malformed, or a medium cannot be opened.
            TooLong: the sample exceeds ``max_length`` and the strategy does not cut.
            Unsupervised: no token is supervised.
        """
        return self.sample(self.draft_in_time(self.conversation(record, media_root)))

    def prompt(self, record: dict[str, Any] | Conversation, media_root: str | None = None) -> Sample:
        """Encode the messages before the last assistant turn, followed by the header of an assistant turn.

        Returns:
            A sample whose labels are all -100.

        Raises:
            DataError: as for a call; also if no message precedes the answer.
            TooLong: the prompt exceeds ``max_length``; a prompt is never cut.
        """
        draft = self._prompt_draft(record, media_root)
        if self.max_length is not None and draft.length > self.max_length:
            raise too_long(draft, self.max_length)
        return self.sample(replace(draft, supervised=np.zeros_like(draft.supervised), weights=None))

    def prompt_length(self, record: dict[str, Any] | Conversation, media_root: str | None = None) -> int:
        """Return the number of tokens of `prompt`, from text and media headers alone."""
        return self._prompt_draft(record, media_root).length

    def length(self, record: dict[str, Any] | Conversation, media_root: str | None = None) -> int:
        """Return the number of tokens of the encoded record, from text and media headers alone."""
        return self.extent(self.conversation(record, media_root)).tokens

    def extent(self, conversation: Conversation) -> Extent:
        """Compute the size of the encoded conversation; several times as fast as `draft`, because it counts tokens
        without encoding them.

        Raises:
            DataError, TooLong, Unsupervised: as `draft`.
        """
        shown = self._show(conversation)
        several = shown.several_frames
        counted = _counted(shown, self.processor, self._tokenizer, conversation.source)
        if counted is not None and (self.max_length is None or counted[0] <= self.max_length):
            return Extent(*counted, bool(shown.videos), 0, 0, several)
        draft = self.draft(conversation)  # cuts the sample, or raises the error that names the fault
        return Extent(draft.length, draft.patches, bool(draft.videos), draft.cut_tokens, draft.cut_media, several)

    def require_sound(
        self, conversation: Conversation, image_grids: list[Grid] | None = None, clips: list[Clip] | None = None
    ) -> None:
        """Ask all questions of `extent` whose answers do not depend on the tokenizer.

        Args:
            image_grids: grids of the conversation's images, if they are known; likewise the clips of its videos.

        Raises:
            DataError: the template leaves something out, a text is not valid, or a medium's header cannot be read.
            Unsupervised: no turn is supervised.
        """
        shown = self._show(conversation, image_grids=image_grids, clips=clips)
        require_unicode(shown.text, conversation.source)
        if (rendered := shown.text.count(IMAGE_PAD)) != len(shown.images):
            raise not_rendered(conversation.source, len(shown.images), "image", rendered)
        if not shown.supervised:
            raise unsupervised(conversation.source, None)

    def conversation(self, record: dict[str, Any] | Conversation, media_root: str | None = None) -> Conversation:
        """Read a record of any supported format; a `Conversation` is returned as it is.

        Raises:
            DataError: the record is malformed.
        """
        if isinstance(record, Conversation):
            return record
        return read_record(record, Source("record", "record", str(record.get("id", ""))), media_root)

    def draft(self, conversation: Conversation, image_grids: list[Grid] | None = None) -> Draft:
        """Compute tokens, label mask and grids, cut to ``max_length``; no pixel is decoded.

        Args:
            image_grids: grids of the conversation's images, if they are known.

        Raises:
            DataError: the template leaves something out, or a medium's header cannot be read.
            TooLong: the sample exceeds ``max_length`` and the strategy does not cut.
            Unsupervised: no token is supervised.
        """
        draft = cut(self._draft(conversation, image_grids=image_grids), self.max_length, self.truncation_strategy)
        require_supervised(draft, self.max_length)
        return draft

    def draft_in_time(self, conversation: Conversation) -> Draft:
        """Compute the draft of a sample that is made next: as `draft`, with the time limit on reading images.

        Raises:
            DataError, TooLong, Unsupervised: as `draft`.
        """
        return self.draft(conversation, image_grids_in_time(conversation, self.processor.image_processor, self.policy))

    def fingerprint(self) -> str:
        """Return a hash of everything that sample lengths depend on, for the keys of caches."""
        settings = {
            "max_length": self.max_length,
            "max_record_bytes": self.max_record_bytes,
            "truncation": self.truncation_strategy,
            "system": self.system_prompt,
            "tools": self.tools,
            "vision_id": self.add_vision_id,
            "thinking": self.enable_thinking,
            "template": self._template.text,
            "special": self._template.special_tokens,
            "image": without_reading(self.processor.image_processor.to_dict()),
            "video": self.processor.video_processor.to_dict(),
            "policy": self.policy.for_sizes(),
            "transformers": transformers.__version__,
        }
        text = json.dumps(settings, sort_keys=True, default=str) + self._tokenizer_fingerprint
        return hashlib.sha256(text.encode()).hexdigest()

    @cached_property
    def _tokenizer_fingerprint(self) -> str:
        return tokenizer_fingerprint(self.processor.tokenizer)

    def _prompt_draft(self, record: dict[str, Any] | Conversation, media_root: str | None) -> Draft:
        return self._draft(without_answer(self.conversation(record, media_root)), invite=True)

    def _draft(
        self, conversation: Conversation, *, invite: bool = False, image_grids: list[Grid] | None = None
    ) -> Draft:
        """Run the steps up to the draft, without truncation."""
        source = conversation.source
        shown = self._show(conversation, invite=invite, image_grids=image_grids)
        encoding = self._tokenizer.encode(shown.text, source)
        ids = np.asarray(encoding.ids, dtype=np.int64)
        supervised = supervised_tokens(encoding, shown.supervised)
        grids = [clip.grid for clip in shown.clips]
        counts, widths = self._media_tokens.spread(ids, shown.image_grids, grids, source)
        group = self._media_tokens.groups(ids, len(shown.images), [t for t, _, _ in grids], shown.text, encoding)
        media = shown.images, shown.image_grids, shown.videos, shown.clips
        weights = token_weights(encoding, shown.supervised, shown.weights) if self.turn_weights else None
        return Draft(ids, supervised, counts, widths, group, *media, source, weights)

    def _show(
        self,
        conversation: Conversation,
        *,
        invite: bool = False,
        image_grids: list[Grid] | None = None,
        clips: list[Clip] | None = None,
    ) -> _Shown:
        """Read the media's headers, render the text and find the supervised spans."""
        source = conversation.source
        messages = conversation.messages
        if not messages:
            raise DataError(f"{source}: the conversation is empty.")
        if self.system_prompt and messages[0].role != "system":
            messages = (Message("system", (Text(self.system_prompt),)), *messages)
        images, videos = conversation.media(Image), conversation.media(Video)
        several: tuple[str, ...] = ()
        if image_grids is None:
            image_grids, several = _image_headers(images, self.processor.image_processor, self.policy, source)
        if clips is None:
            clips = [plan_clip(video, self.processor.video_processor, self.policy, source) for video in videos]
        tools = list(conversation.tools or self.tools or ())
        variables = {"add_vision_id": self.add_vision_id, "enable_thinking": self.enable_thinking}
        text = self._template.render(messages, tools, source, invite=invite, **variables)
        if (size := utf8_bytes(text, self.max_record_bytes)) > self.max_record_bytes:
            raise too_large(str(source), size, self.max_record_bytes, "conversation")
        text = write_times(text, clips, self.processor, source)
        turns = find_turns(text, messages, source)
        require_tools_shown(text, tools, source)
        spans = supervised_spans(messages, turns, text, self._template.openings)
        return _Shown(text, spans, weights_of(messages), images, image_grids, videos, clips, several)

    def sample(self, draft: Draft, owned: NDArray[np.bool_] | None = None, *, blank: bool = False) -> Sample:
        """Expand a draft to L tokens, and add positions and pixels.

        Args:
            owned: bool[F], see part.py: whether to make the pixels of each frame; None makes all. Tokens, labels,
                positions and grids do not depend on it.
            blank: make empty pixels of the same shape, and read no medium.

        Raises:
            DataError: a medium cannot be decoded, or was changed since its header was read.
        """
        sample = expand(draft)
        shown = draft if owned is None else part_of(draft, owned, self.processor.video_processor.temporal_patch_size)
        sample.update(media_pixels(shown, self.processor, self.policy, raw=self.raw_pixels, blank=blank))
        return sample
