"""One conversation -> one sample, or its exact length without looking at a pixel.

Both go through a `Draft`: the tokens with one placeholder per image or frame, what is supervised, and the grid of each
medium, which follows from the media's headers. Letters: D draft tokens, L tokens, P patches, N images.
"""

import hashlib
import json
import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from jinja2 import TemplateError
from numpy.typing import NDArray
from transformers import Qwen3VLProcessor

from qwenvl_ft.data.conversation import IGNORE, Conversation, Image, Limits, Message, Sample, Source, Text, Video
from qwenvl_ft.data.encode.counting import TokenCounter
from qwenvl_ft.data.encode.draft import (
    IMAGE_PAD,
    STRATEGIES,
    VIDEO_PAD,
    VISION_END,
    VISION_START,
    Draft,
    Unsupervised,
    cut,
    refuse_control,
    shown_turns,
    template_message,
    token_span,
    too_long,
)
from qwenvl_ft.data.encode.rope import mrope_positions
from qwenvl_ft.data.media.deadline import within
from qwenvl_ft.data.media.grids import Grid, checked_grids, image_grid
from qwenvl_ft.data.media.images import MediaPolicy, medium_name, open_image
from qwenvl_ft.data.media.patches import raw_patches, resized
from qwenvl_ft.data.media.video import Clip, clip_pixels, plan_clip
from qwenvl_ft.data.readers import read_record
from qwenvl_ft.errors import DataError, RecipeError, one_line, unknown_name
from qwenvl_ft.upstream.processors import require_known_rule, video_patches
from qwenvl_ft.upstream.templates import TemplateRenderer, render_with_tools


class Extent(NamedTuple):
    """What planning needs of a sample."""

    tokens: int
    patches: int
    has_video: bool
    cut_tokens: int
    """Tokens that ``max_length`` took off."""
    cut_media: int
    """Images and videos that went with them."""


class _Shown(NamedTuple):
    """A conversation in the template's text, each image or frame one placeholder."""

    text: str
    supervised: list[tuple[int, int]]
    """Characters [begin, end) of each answer that is learned from."""
    images: list[Image]
    image_grids: list[Grid]
    videos: list[Video]
    clips: list[Clip]


class Encoder:
    """Makes samples of records: tokens of the processor's own chat template, labels, positions, pixels.

    Args:
        processor: a Qwen2-VL, Qwen2.5-VL or Qwen3-VL processor.
        max_length: most tokens of a sample; None for no limit.
        truncation_strategy: what happens to a longer one. ``raise`` and ``delete`` raise `TooLong` (planning counts
            the deleted), ``right`` and ``left`` cut that end off, never through an image or a video.
        system_prompt: used where a conversation has no system message of its own.
        tools: function schemas, used where a conversation has none of its own.
        add_vision_id: let the template number the media ("Picture 1: ").
        policy: what media may be opened.
        raw_pixels: images as raw patches (data/media/patches.py), which a model takes after `use_raw_patches`.

    Raises:
        RecipeError: an unknown strategy, a control token in the system prompt or the tools, or a transformers whose
            processors resize by a rule that is not known.
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
        policy: MediaPolicy | None = None,
        raw_pixels: bool = False,
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
        self.policy = policy or MediaPolicy()
        self.raw_pixels = raw_pixels
        self._tokenizer = processor.tokenizer.backend_tokenizer
        self._count = TokenCounter(self._tokenizer)
        self._image_id = self._tokenizer.token_to_id(IMAGE_PAD)
        self._video_id = self._tokenizer.token_to_id(VIDEO_PAD)
        self._start_id = self._tokenizer.token_to_id(VISION_START)
        self._end_id = self._tokenizer.token_to_id(VISION_END)
        self._template = processor.chat_template or processor.tokenizer.chat_template
        self._rendered = TemplateRenderer(processor.tokenizer, self._template)
        require_known_rule(processor)

    def __call__(self, record: dict[str, Any] | Conversation, media_root: str | None = None) -> Sample:
        """Encode a record for training.

        Raises:
            DataError: the record is malformed, a medium cannot be opened, or nothing of it is supervised.
            TooLong: it exceeds ``max_length`` and the strategy does not cut.
        """
        conversation = self.conversation(record, media_root)
        return self._sample(self.draft(conversation, self._grids_in_time(conversation)))

    def _grids_in_time(self, conversation: Conversation) -> list[Grid]:
        """Grids of the images, from their headers; a disk that does not answer has an end and a name."""
        images, source = conversation.media(Image), conversation.source
        if not images:
            return []
        processor = self.processor.image_processor
        grids = (image_grid(image, processor, self.policy, source) for image in images)
        return list(within(lambda: grids, self.policy.image_timeout, partial(self._late, images, source)))

    def prompt(self, record: dict[str, Any] | Conversation, media_root: str | None = None) -> Sample:
        """Encode what stands before the last assistant turn, and the template's invitation to answer.

        Returns:
            A sample whose labels are all -100. It is never cut: a prompt above ``max_length`` is an error.
        """
        draft = self._prompt_draft(record, media_root)
        if self.max_length is not None and draft.length > self.max_length:
            raise too_long(draft, self.max_length)
        return self._sample(replace(draft, supervised=np.zeros_like(draft.supervised)))

    def prompt_length(self, record: dict[str, Any] | Conversation, media_root: str | None = None) -> int:
        """Tokens of the sample that `prompt` would make, from text and media headers alone."""
        return self._prompt_draft(record, media_root).length

    def _prompt_draft(self, record: dict[str, Any] | Conversation, media_root: str | None) -> Draft:
        conversation = self.conversation(record, media_root)
        messages = conversation.messages
        if messages[-1].role == "assistant":
            messages = messages[:-1]
        if not messages:
            raise DataError(f"{conversation.source}: nothing stands before the answer, so there is no prompt.")
        return self._tokenize(Conversation(messages, conversation.source, conversation.tools), invite=True)

    def length(self, record: dict[str, Any] | Conversation, media_root: str | None = None) -> int:
        """Tokens of the sample that `__call__` would make, from text and media headers alone."""
        return self.extent(self.conversation(record, media_root)).tokens

    def extent(self, conversation: Conversation) -> Extent:
        """Of the sample that `__call__` would make, without its ids; several times as fast as `draft`.

        Raises:
            DataError, TooLong, Unsupervised: as `draft`.
        """
        shown = self._show(conversation)
        media = (
            (IMAGE_PAD, self.processor.image_processor.merge_size, shown.image_grids),
            (VIDEO_PAD, self.processor.video_processor.merge_size, [clip.grid for clip in shown.clips]),
        )
        whole = all(shown.text.count(pad) == sum(t for t, _, _ in grids) for pad, _, grids in media)
        if whole and shown.supervised:
            tokens = self._counted(shown.text, conversation.source)
            tokens += sum(t * (h * w // merge**2 - 1) for _, merge, grids in media for t, h, w in grids)
            if self.max_length is None or tokens <= self.max_length:
                patches = sum(t * h * w for _, _, grids in media for t, h, w in grids)
                return Extent(tokens, patches, bool(shown.videos), 0, 0)
        draft = self.draft(conversation)  # a cut one, or the error that says why not
        return Extent(draft.length, draft.patches, bool(draft.videos), draft.cut_tokens, draft.cut_media)

    def conversation(self, record: dict[str, Any] | Conversation, media_root: str | None = None) -> Conversation:
        if isinstance(record, Conversation):
            return record
        return read_record(record, Source("record", "record", str(record.get("id", ""))), media_root)

    def draft(self, conversation: Conversation, image_grids: list[Grid] | None = None) -> Draft:
        """Tokens, labels and grids of a conversation, cut to ``max_length``; no pixel is decoded.

        Args:
            image_grids: those of its images, if they are known.
        """
        draft = cut(self._tokenize(conversation, image_grids=image_grids), self.max_length, self.truncation_strategy)
        if not draft.supervised[1:].any():
            raise Unsupervised(
                f"{draft.source}: no token is supervised. Each record needs an assistant turn"
                + (" within template.max_length." if self.max_length is not None else ".")
            )
        return draft

    def fingerprint(self) -> str:
        """Key of everything that decides lengths, for caches."""
        told = {
            "max_length": self.max_length,
            "truncation": self.truncation_strategy,
            "system": self.system_prompt,
            "tools": self.tools,
            "vision_id": self.add_vision_id,
            "template": self._template,
            "special": self._rendered.special_tokens,
            "image": self.processor.image_processor.to_dict(),
            "video": self.processor.video_processor.to_dict(),
            "policy": asdict(self.policy),
            "transformers": transformers.__version__,
        }
        return hashlib.sha256(
            (json.dumps(told, sort_keys=True, default=str) + self._tokenizer_key).encode()
        ).hexdigest()

    @cached_property
    def _tokenizer_key(self) -> str:
        """Of its file and of what may be changed after that was read: a tenth of the time that writing it out takes."""
        tokenizer, told = self._tokenizer, hashlib.sha256()
        file = Path(self.processor.tokenizer.name_or_path or "/", "tokenizer.json")
        told.update(file.read_bytes() if file.is_file() else tokenizer.to_str().encode())
        states = [pickle.dumps(part, protocol=4) for part in (tokenizer.normalizer, tokenizer.pre_tokenizer)]
        added = sorted((number, repr(token)) for number, token in tokenizer.get_added_tokens_decoder().items())
        switches = tokenizer.truncation, tokenizer.padding, tokenizer.encode_special_tokens
        told.update(repr((states, added, switches, tokenizer.get_vocab_size())).encode())
        return told.hexdigest()

    # -- text ------------------------------------------------------------------------------------------------------

    def _tokenize(
        self, conversation: Conversation, *, invite: bool = False, image_grids: list[Grid] | None = None
    ) -> Draft:
        source = conversation.source
        shown = self._show(conversation, invite=invite, image_grids=image_grids)
        encoding = self._encode(shown.text, source)
        ids = np.asarray(encoding.ids, dtype=np.int64)
        supervised = np.zeros(ids.size, dtype=bool)
        for begin, end in shown.supervised:
            first, last = token_span(encoding, begin, end)
            supervised[first:last] = True
        grids = [clip.grid for clip in shown.clips]
        counts, widths = self._spread(ids, shown.image_grids, grids, source)
        group = self._groups(ids, len(shown.images), [time for time, _, _ in grids], shown.text, encoding)
        media = shown.images, shown.image_grids, shown.videos, shown.clips
        return Draft(ids, supervised, counts, widths, group, *media, source)

    def _show(
        self, conversation: Conversation, *, invite: bool = False, image_grids: list[Grid] | None = None
    ) -> _Shown:
        source = conversation.source
        messages = conversation.messages
        if not messages:
            raise DataError(f"{source}: the conversation is empty.")
        if self.system_prompt and messages[0].role != "system":
            messages = (Message("system", (Text(self.system_prompt),)), *messages)
        images, videos = conversation.media(Image), conversation.media(Video)
        if image_grids is None:
            image_grids = [image_grid(image, self.processor.image_processor, self.policy, source) for image in images]
        clips = [plan_clip(video, self.processor.video_processor, self.policy, source) for video in videos]
        tools = list(conversation.tools or self.tools or ())
        text = self._render(messages, tools, invite, source)
        text = self._write_times(text, clips, source)
        spans = zip(messages, shown_turns(text, messages, tools, source), strict=True)
        supervised = [span for message, span in spans if message.role == "assistant" and message.loss is not False]
        return _Shown(text, supervised, images, image_grids, videos, clips)

    def _render(self, messages: tuple[Message, ...], tools: list[Any], invite: bool, source: Source) -> str:
        chat = [template_message(message, source) for message in messages]
        refuse_control(tools, f"{source}: a tool")
        told = {"add_generation_prompt": invite, "add_vision_id": self.add_vision_id}
        try:
            if tools or any("tool_calls" in message for message in chat):
                return render_with_tools(self.processor.tokenizer, self._template, chat, tools or None, **told)
            return self._rendered(chat, **told)
        except (TemplateError, TypeError, ValueError) as error:
            raise DataError(f"{source}: the chat template cannot show it: {one_line(error)}.") from None

    def _encode(self, text: str, source: Source) -> Any:
        with _lone_surrogates_named(text, source):
            return self._tokenizer.encode(text, add_special_tokens=False)

    def _counted(self, text: str, source: Source) -> int:
        with _lone_surrogates_named(text, source):
            return self._count(text)

    def _write_times(self, text: str, clips: list[Clip], source: Source) -> str:
        """Replace each video's one placeholder by a time and a placeholder per step in time.

        The released models saw ``<0.3 seconds><|vision_start|>...<|vision_end|>`` with nothing around it (processors
        of transformers 4.57 to 5.9); later processors keep an outer pair, which the models were not trained on.
        """
        if not clips:
            return text
        if not isinstance(self.processor, Qwen3VLProcessor):
            raise DataError(f"{source}: videos need a Qwen3-VL processor, not {type(self.processor).__name__}.")
        pieces = text.split(VISION_START + VIDEO_PAD + VISION_END)
        if len(pieces) != len(clips) + 1:
            raise DataError(f"{source}: {len(clips)} videos, but the chat template shows {len(pieces) - 1}.")
        written, step = [pieces[0]], self.processor.video_processor.temporal_patch_size
        for clip, piece in zip(clips, pieces[1:], strict=True):
            written += [f"<{seconds:.1f} seconds>{VISION_START}{VIDEO_PAD}{VISION_END}" for seconds in clip.times(step)]
            written.append(piece)
        return "".join(written)

    def _spread(
        self,
        ids: NDArray[np.int64],
        image_grids: list[Grid],
        video_grids: list[Grid],
        source: Source,
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """How many tokens each draft token becomes, and how many stand in a line of its grid."""
        counts = np.ones(ids.size, dtype=np.int64)
        widths = np.zeros(ids.size, dtype=np.int64)
        frames = [(h, w) for t, h, w in video_grids for _ in range(t)]
        merge = {
            self._image_id: self.processor.image_processor.merge_size,
            self._video_id: self.processor.video_processor.merge_size,
        }
        for token, grids, kind in (
            (self._image_id, [(h, w) for _, h, w in image_grids], "image"),
            (self._video_id, frames, "video frame"),
        ):
            places = np.flatnonzero(ids == token)
            if places.size != len(grids):
                raise DataError(f"{source}: {len(grids)} {kind}s, but the chat template shows {places.size}.")
            if places.size:
                lines, line = (np.asarray(grids, dtype=np.int64) // merge[token]).T
                counts[places], widths[places] = lines * line, line
        return counts, widths

    def _groups(
        self, ids: NDArray[np.int64], num_images: int, pairs: list[int], text: str, encoding: Any
    ) -> NDArray[np.int64]:
        """The medium each draft token belongs to; a video's frames and the times between them are one medium."""
        group = np.full(ids.size, -1, dtype=np.int64)
        if not num_images and not pairs:
            return group
        opens = np.flatnonzero(ids == self._start_id)
        closes = np.flatnonzero(ids == self._end_id)
        is_image = ids[opens + 1] == self._image_id
        for number, (first, last) in enumerate(zip(opens[is_image], closes[is_image], strict=True)):
            group[first : last + 1] = number
        frame_opens, frame_closes = opens[~is_image], closes[~is_image]
        frame = 0
        for number, count in enumerate(pairs):
            char = text.rfind("<", 0, encoding.token_to_chars(int(frame_opens[frame]))[0])
            first = encoding.char_to_token(char)
            group[first : frame_closes[frame + count - 1] + 1] = num_images + number
            frame += count
        return group

    # -- pixels ----------------------------------------------------------------------------------------------------

    def _sample(self, draft: Draft) -> Sample:
        ids = np.repeat(draft.ids, draft.counts)
        labels = np.where(np.repeat(draft.supervised, draft.counts), ids, IGNORE)
        labels[:1] = IGNORE
        sample: Sample = {
            "input_ids": torch.from_numpy(ids),
            "labels": torch.from_numpy(labels),
            "position_ids": torch.from_numpy(mrope_positions(draft.counts, draft.widths)),
            "source": draft.source,
        }
        if draft.images:
            sample["pixel_values"], sample["image_grid_thw"] = self._image_pixels(draft)
        if draft.videos:
            sample["pixel_values_videos"], sample["video_grid_thw"] = self._video_pixels(draft)
        return sample

    def _image_pixels(self, draft: Draft) -> tuple[torch.Tensor, torch.Tensor]:
        late = partial(self._late, draft.images, draft.source)
        made = list(within(lambda: self._opened(draft), self.policy.image_timeout, late))
        images, grids = [pixels for pixels, _ in made], [grid for _, grid in made]
        checked = checked_grids(torch.tensor(grids), draft.image_grids, draft.source)
        if self.raw_pixels:
            return images[0] if len(images) == 1 else torch.cat(images), checked
        processor = self.processor.image_processor
        side = processor.patch_size
        if all(image.limits == Limits() for image in draft.images):
            told = processor(images=images, return_tensors="pt")
        else:  # each image as one that has its size already
            sized = [
                resized(torch.from_numpy(np.array(pixels)).permute(2, 0, 1), high * side, wide * side, processor)
                for pixels, (_, high, wide) in zip(images, grids, strict=True)
            ]
            told = processor(images=sized, do_resize=False, return_tensors="pt")
        return told["pixel_values"], checked_grids(told["image_grid_thw"], grids, draft.source)

    def _opened(self, draft: Draft) -> Iterator[tuple[Any, Grid]]:
        """Each image's patches, or the image where the processor makes them, and its grid as it is now."""
        processor = self.processor.image_processor
        for image in draft.images:
            try:
                pixels = open_image(image.value, self.policy)
            except DataError as error:
                raise DataError(f"{draft.source}: {error}") from None
            grid = image_grid(replace(image, value=pixels), processor, self.policy, draft.source)
            yield raw_patches(pixels, grid, processor) if self.raw_pixels else pixels, grid

    def _late(self, images: Sequence[Image], source: Source, came: int) -> DataError:
        return DataError(
            f"{source}: image {medium_name(images[came].value)} cannot be read within data.image_timeout="
            f"{self.policy.image_timeout:g} s. Is its disk or network slow? Drop the record, or raise the limit."
        )

    def _video_pixels(self, draft: Draft) -> tuple[torch.Tensor, torch.Tensor]:
        processor = self.processor.video_processor
        clips = [
            clip_pixels(video, clip, processor, self.policy, draft.source)
            for video, clip in zip(draft.videos, draft.clips, strict=True)
        ]
        pixels = video_patches(processor, clips, [clip.rate for clip in draft.clips])
        return pixels["pixel_values_videos"], checked_grids(pixels["video_grid_thw"], draft.video_grids, draft.source)


@contextmanager
def _lone_surrogates_named(text: str, source: Source) -> Iterator[None]:
    """Raises DataError instead of what tokenizers say of half a character."""
    try:
        yield
    except (TypeError, UnicodeEncodeError):
        lone = next((char for char in text if "\ud800" <= char <= "\udfff"), None)
        if lone is None:
            raise
        raise DataError(
            f"{source}: the text holds U+{ord(lone):04X}, half of a character (a lone surrogate), near "
            f"{text[max(0, text.index(lone) - 20) : text.index(lone)]!r}. Correct the record."
        ) from None
