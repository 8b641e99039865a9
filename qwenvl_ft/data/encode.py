"""One conversation -> one sample, or its exact length without looking at a pixel.

Both go through a `Draft`: the tokens with one placeholder per image or frame, what is supervised, and the grid of each
medium, which follows from the media's headers. Letters: D draft tokens, L tokens, P patches, N images.
"""

import hashlib
import json
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize as image_resize
from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize as video_resize
from transformers.utils.chat_template_utils import render_jinja_template
from transformers.video_utils import VideoMetadata

from qwenvl_ft.data.conversation import Conversation, Image, Message, Sample, Source, Text, Video
from qwenvl_ft.data.media import MediaPolicy, image_size, open_image
from qwenvl_ft.data.readers import read_record
from qwenvl_ft.data.rope import mrope_positions
from qwenvl_ft.errors import DataError, unknown_name

IGNORE = -100
TURN, TURN_END = "<|im_start|>", "<|im_end|>"
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
IMAGE_PAD, VIDEO_PAD = "<|image_pad|>", "<|video_pad|>"
CONTROL = (TURN, TURN_END, "<|endoftext|>", VISION_START, VISION_END, "<|vision_pad|>", IMAGE_PAD, VIDEO_PAD)
"""Only the template writes these. Text that held one would open a turn or a medium of its own."""

STRATEGIES = ("raise", "delete", "left", "right")
DEFAULT_FPS = 2.0
"""Frames a second of a list of frames that does not say; the rate at which the released models sample videos."""


class TooLong(DataError):
    """A sample does not fit ``max_length`` and the strategy forbids to cut it."""


class Unsupervised(DataError):
    """No token of the sample is supervised, so nothing can be learned from it."""


@dataclass(frozen=True)
class Draft:
    """A conversation in tokens, each image or frame still one placeholder."""

    ids: NDArray[np.int64]
    """[D]"""
    supervised: NDArray[np.bool_]
    """[D]"""
    counts: NDArray[np.int64]
    """[D] tokens that each becomes; 1 for text."""
    widths: NDArray[np.int64]
    """[D] tokens in a line of the grid; 0 for text."""
    group: NDArray[np.int64]
    """[D] number of the medium that the token belongs to, borders and times included; -1 for text."""
    images: list[Image]
    image_grids: list[tuple[int, int, int]]
    """Patches along time, height, width."""
    videos: list[Video]
    video_grids: list[tuple[int, int, int]]
    source: Source

    @property
    def length(self) -> int:
        return int(self.counts.sum())

    @property
    def patches(self) -> int:
        return sum(t * h * w for t, h, w in self.image_grids + self.video_grids)


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

    Raises:
        RecipeError: an unknown strategy.
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
    ) -> None:
        if truncation_strategy not in STRATEGIES:
            raise unknown_name("template.truncation_strategy", truncation_strategy, STRATEGIES)
        self.processor = processor
        self.max_length = max_length
        self.truncation_strategy = truncation_strategy
        self.system_prompt = system_prompt
        self.tools = tools
        self.add_vision_id = add_vision_id
        self.policy = policy or MediaPolicy()
        self._tokenizer = processor.tokenizer.backend_tokenizer
        self._image_id = self._tokenizer.token_to_id(IMAGE_PAD)
        self._video_id = self._tokenizer.token_to_id(VIDEO_PAD)
        self._start_id = self._tokenizer.token_to_id(VISION_START)
        self._end_id = self._tokenizer.token_to_id(VISION_END)
        self._template = processor.chat_template or processor.tokenizer.chat_template

    def __call__(self, record: dict[str, Any] | Conversation, media_root: str | None = None) -> Sample:
        """Encode a record for training.

        Raises:
            DataError: the record is malformed, a medium cannot be opened, or nothing of it is supervised.
            TooLong: it exceeds ``max_length`` and the strategy does not cut.
        """
        return self._sample(self.draft(self.conversation(record, media_root)))

    def prompt(self, record: dict[str, Any] | Conversation, media_root: str | None = None) -> Sample:
        """Encode what stands before the last assistant turn, and the template's invitation to answer.

        Returns:
            A sample whose labels are all -100. It is never cut: a prompt above ``max_length`` is an error.
        """
        conversation = self.conversation(record, media_root)
        messages = conversation.messages
        if messages[-1].role == "assistant":
            messages = messages[:-1]
        if not messages:
            raise DataError(f"{conversation.source}: nothing stands before the answer, so there is no prompt.")
        draft = self._tokenize(Conversation(messages, conversation.source, conversation.tools), invite=True)
        if self.max_length is not None and draft.length > self.max_length:
            raise self._too_long(draft)
        return self._sample(replace(draft, supervised=np.zeros_like(draft.supervised)))

    def length(self, record: dict[str, Any] | Conversation, media_root: str | None = None) -> int:
        """Tokens of the sample that `__call__` would make, from text and media headers alone."""
        return self.draft(self.conversation(record, media_root)).length

    def conversation(self, record: dict[str, Any] | Conversation, media_root: str | None = None) -> Conversation:
        if isinstance(record, Conversation):
            return record
        return read_record(record, Source("record", "record", str(record.get("id", ""))), media_root)

    def draft(self, conversation: Conversation) -> Draft:
        """Tokens, labels and grids of a conversation, cut to ``max_length``; no pixel is decoded."""
        draft = self._cut(self._tokenize(conversation))
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
            "image": self.processor.image_processor.to_dict(),
            "video": self.processor.video_processor.to_dict(),
        }
        digest = hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode())
        digest.update(self._tokenizer.to_str().encode())
        return digest.hexdigest()

    # -- text ------------------------------------------------------------------------------------------------------

    def _tokenize(self, conversation: Conversation, *, invite: bool = False) -> Draft:
        source = conversation.source
        messages = conversation.messages
        if not messages:
            raise DataError(f"{source}: the conversation is empty.")
        if self.system_prompt and messages[0].role != "system":
            messages = (Message("system", (Text(self.system_prompt),)), *messages)
        images, videos = conversation.media(Image), conversation.media(Video)
        image_grids = [self._image_grid(image, source) for image in images]
        video_grids = [self._video_grid(video, source) for video in videos]
        text = self._render(messages, conversation.tools or self.tools, invite, source)
        text = self._write_times(text, videos, video_grids, source)
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        ids = np.asarray(encoding.ids, dtype=np.int64)
        supervised = np.zeros(ids.size, dtype=bool)
        for begin, end in self._answers(text, messages, source):
            first, last = _token_span(encoding, begin, end)
            supervised[first:last] = True
        counts, widths = self._spread(ids, image_grids, video_grids, source)
        group = self._groups(ids, len(images), [t for t, _, _ in video_grids], text, encoding)
        return Draft(ids, supervised, counts, widths, group, images, image_grids, videos, video_grids, source)

    def _render(self, messages: tuple[Message, ...], tools: Any, invite: bool, source: Source) -> str:
        chat = [_template_message(message, source) for message in messages]
        rendered: Any = render_jinja_template(
            conversations=[chat],
            tools=list(tools) if tools else None,
            chat_template=self._template,
            add_generation_prompt=invite,
            add_vision_id=self.add_vision_id,
        )
        return rendered[0][0]

    def _write_times(self, text: str, videos: list[Video], grids: list[tuple[int, int, int]], source: Source) -> str:
        """Replace each video's one placeholder by a time and a placeholder per frame pair.

        The released models saw ``<0.3 seconds><|vision_start|>...<|vision_end|>`` with nothing around it (processors
        of transformers 4.57 to 5.9); later processors keep an outer pair, which the models were not trained on.
        """
        if not videos:
            return text
        pieces = text.split(VISION_START + VIDEO_PAD + VISION_END)
        if len(pieces) != len(videos) + 1:
            raise DataError(f"{source}: {len(videos)} videos, but the chat template shows {len(pieces) - 1}.")
        written = [pieces[0]]
        for video, (pairs, _, _), piece in zip(videos, grids, pieces[1:], strict=True):
            times = self._times(video)
            written += [f"<{times[k]:.1f} seconds>{VISION_START}{VIDEO_PAD}{VISION_END}" for k in range(pairs)]
            written.append(piece)
        return "".join(written)

    def _times(self, video: Video) -> list[float]:
        """Seconds of each frame pair, the mean of its two frames; an odd last frame is doubled."""
        step = self.processor.video_processor.temporal_patch_size
        count = len(video.value)
        frames = np.minimum(np.arange(count + -count % step), count - 1) / (video.fps or DEFAULT_FPS)
        return [float(frames[k] + frames[k + step - 1]) / 2 for k in range(0, frames.size, step)]

    def _answers(self, text: str, messages: tuple[Message, ...], source: Source) -> list[tuple[int, int]]:
        """Characters of each supervised turn: its content, the end token and the newline.

        A turn begins where the template writes ``<|im_start|>``; no text can hold that token (`_template_message`), so
        a user who writes "assistant" is not mistaken for one.
        """
        header = f"{TURN}assistant\n"
        wanted = [message for message in messages if message.role == "assistant"]
        spans: list[tuple[int, int]] = []
        begin = text.find(header)
        while begin >= 0 and len(spans) < len(wanted):
            begin += len(header)
            end = text.find(TURN_END, begin)
            if end < 0:
                break
            end += len(TURN_END)
            spans.append((begin, end + text.startswith("\n", end)))
            begin = text.find(header, end)
        if len(spans) != len(wanted):
            raise DataError(
                f"{source}: {len(wanted)} assistant turns, but the chat template shows {len(spans)} as "
                f"{header!r} ... {TURN_END!r}. This processor's template is not supported."
            )
        return [span for span, message in zip(spans, wanted, strict=True) if message.loss is not False]

    def _spread(
        self,
        ids: NDArray[np.int64],
        image_grids: list[tuple[int, int, int]],
        video_grids: list[tuple[int, int, int]],
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

    # -- cutting ---------------------------------------------------------------------------------------------------

    def _cut(self, draft: Draft) -> Draft:
        if self.max_length is None or draft.length <= self.max_length:
            return draft
        if self.truncation_strategy not in ("left", "right"):
            raise self._too_long(draft)
        ends = np.cumsum(draft.counts)
        if self.truncation_strategy == "right":
            stop = int(np.searchsorted(ends, self.max_length, side="right"))
            while stop > 0 and _inside(draft.group, stop):
                stop -= 1
            keep = slice(0, stop)
        else:
            start = int(np.searchsorted(ends, draft.length - self.max_length, side="left")) + 1
            while start < draft.ids.size and _inside(draft.group, start):
                start += 1
            keep = slice(start, draft.ids.size)
        return _slice(draft, keep)

    def _too_long(self, draft: Draft) -> TooLong:
        media = f", {draft.patches} patches of media" if draft.patches else ""
        return TooLong(
            f"{draft.source}: {draft.length} tokens{media}, but template.max_length is {self.max_length}. Raise it, "
            "lower template.max_pixels, or set template.truncation_strategy to delete, left or right."
        )

    # -- media -----------------------------------------------------------------------------------------------------

    def _image_grid(self, image: Image, source: Source) -> tuple[int, int, int]:
        processor = self.processor.image_processor
        try:
            height, width = image_size(image.value, self.policy)
            if processor.do_resize:
                height, width = image_resize(
                    height,
                    width,
                    factor=processor.patch_size * processor.merge_size,
                    min_pixels=processor.size["shortest_edge"],
                    max_pixels=processor.size["longest_edge"],
                )
        except ValueError as error:  # DataError of the media, or the resize rule's own limit on the aspect ratio
            raise DataError(f"{source}: {error}") from None
        return 1, height // processor.patch_size, width // processor.patch_size

    def _video_grid(self, video: Video, source: Source) -> tuple[int, int, int]:
        processor = self.processor.video_processor
        if not hasattr(processor, "max_video_tokens"):
            raise DataError(f"{source}: videos need a Qwen3-VL processor, not {type(self.processor).__name__}.")
        if isinstance(video.value, str):
            raise DataError(f"{source}: {video.value} is a video file. Give the video as a list of its frames.")
        frames = len(video.value)
        try:
            sizes = {image_size(frame, self.policy) for frame in video.value}
            if len(sizes) != 1:
                raise DataError(f"the frames of a video have several sizes (height, width): {sorted(sizes)[:3]}.")
            height, width = sizes.pop()
            factor = processor.patch_size * processor.merge_size
            longest = processor.size["longest_edge"]
            if processor.cap_pixels_per_frame:
                cap = min(processor.max_video_tokens * factor * factor, longest // frames)
                longest = max(cap, int(processor.size["shortest_edge"] * 1.05)) * frames
            height, width = video_resize(
                frames,
                height,
                width,
                temporal_factor=processor.temporal_patch_size,
                factor=factor,
                min_pixels=processor.size["shortest_edge"],
                max_pixels=longest,
            )
        except ValueError as error:
            raise DataError(f"{source}: {error}") from None
        pairs = -(-frames // processor.temporal_patch_size)
        return pairs, height // processor.patch_size, width // processor.patch_size

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
        try:
            images = [open_image(image.value, self.policy) for image in draft.images]
        except DataError as error:
            raise DataError(f"{draft.source}: {error}") from None
        pixels = self.processor.image_processor(images=images, return_tensors="pt")
        return pixels["pixel_values"], _checked(pixels["image_grid_thw"], draft.image_grids, draft.source)

    def _video_pixels(self, draft: Draft) -> tuple[torch.Tensor, torch.Tensor]:
        videos, metadata = [], []
        for video in draft.videos:
            try:
                frames = [np.asarray(open_image(frame, self.policy)) for frame in video.value]
            except DataError as error:
                raise DataError(f"{draft.source}: {error}") from None
            videos.append(torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2))
            metadata.append(VideoMetadata(total_num_frames=len(frames), fps=video.fps or DEFAULT_FPS))
        processor = self.processor.video_processor
        pixels = processor(
            videos=videos,
            video_metadata=metadata,
            do_sample_frames=False,
            cap_pixels_per_frame=bool(processor.cap_pixels_per_frame),
            return_tensors="pt",
        )
        return pixels["pixel_values_videos"], _checked(pixels["video_grid_thw"], draft.video_grids, draft.source)


def _template_message(message: Message, source: Source) -> dict[str, Any]:
    """A message as chat templates take it; text with a control token is refused."""
    content: list[dict[str, str]] = []
    for part in message.content:
        if isinstance(part, Text):
            for token in CONTROL:
                if token in part.text:
                    raise DataError(
                        f"{source}: the text of a {message.role} message holds the control token {token}. "
                        "Media are written <image> or <video>; other control tokens are the template's alone."
                    )
            content.append({"type": "text", "text": part.text})
        else:
            content.append({"type": "image" if isinstance(part, Image) else "video"})
    told: dict[str, Any] = {"role": message.role, "content": content}
    if message.tool_calls:
        told["tool_calls"] = list(message.tool_calls)
    return told


def _token_span(encoding: Any, begin: int, end: int) -> tuple[int, int]:
    """Tokens that lie wholly in the characters [begin, end).

    An answer that begins with a newline shares its first token with the header's newline; that token stays outside, as
    in the official preprocessing.
    """
    token = encoding.char_to_token(begin)
    while token is None:  # a character that normalisation folded into another
        begin += 1
        token = encoding.char_to_token(begin)
    first = token if encoding.token_to_chars(token)[0] >= begin else token + 1
    return first, encoding.char_to_token(end - 1) + 1


def _inside(group: NDArray[np.int64], place: int) -> bool:
    """Whether a cut before ``place`` goes through a medium."""
    return bool(group[place] >= 0 and group[place - 1] == group[place])


def _slice(draft: Draft, keep: slice) -> Draft:
    """The draft of some of its tokens, with the media that they still show."""
    group = draft.group[keep]
    images, videos = range(len(draft.images)), range(len(draft.videos))
    kept = set(group[group >= 0].tolist())
    kept_images = [k for k in images if k in kept]
    kept_videos = [k for k in videos if k + len(draft.images) in kept]
    return Draft(
        draft.ids[keep],
        draft.supervised[keep],
        draft.counts[keep],
        draft.widths[keep],
        group,
        [draft.images[k] for k in kept_images],
        [draft.image_grids[k] for k in kept_images],
        [draft.videos[k] for k in kept_videos],
        [draft.video_grids[k] for k in kept_videos],
        draft.source,
    )


def _checked(actual: torch.Tensor, planned: list[tuple[int, int, int]], source: Source) -> torch.Tensor:
    """The processor's grids, if they are the planned ones.

    Raises:
        DataError: an image changed its size between planning and now, or its header lies.
    """
    grids = actual.to(torch.int64)
    if grids.tolist() != [list(grid) for grid in planned]:
        raise DataError(
            f"{source}: the media's headers promise grids {planned}, but their pixels give {grids.tolist()} "
            "(patches along time, height, width). Was a file changed?"
        )
    return grids
