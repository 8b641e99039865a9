"""The sections ``template``, ``data`` and ``prompts``: which records are read, and how they become tokens."""

from dataclasses import dataclass, field
from typing import Any, Literal

from qwenvl_ft.recipe.limits import Count, Fraction, NonNegative, NonNegativeFloat, Positive, PositiveFloat, Share


@dataclass(kw_only=True)
class TemplateConfig:
    """From conversations to tokens."""

    template: Literal["qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe", "qwen2_5_vl", "qwen2_vl", "qwen"] = (
        "qwen3_vl"
    )
    """Template name as in other libraries, for their command lines. The text always comes from the processor's own
    chat template."""
    max_length: Positive = 8192
    """Length limit of a sample and of a packed row, in tokens, images included."""
    truncation_strategy: Literal["raise", "delete", "left", "right"] = "delete"
    """What to do with longer samples: raise stops the run, delete drops and counts the sample, left and right cut
    tokens from that end, but never part of an image."""
    min_pixels: Positive | None = None
    """Smallest area of an image after resizing, in pixels; null keeps the processor's value."""
    max_pixels: Positive | None = None
    """Largest area of an image after resizing, in pixels; null keeps the processor's value. A token of Qwen3-VL covers
    32 x 32 = 1024 pixels."""
    fps: PositiveFloat | None = None
    """Frames sampled per second of a video file; null keeps the processor's value (2)."""
    fps_min_frames: Positive | None = None
    """Minimum number of frames sampled from a video file if it has that many; null keeps the processor's value (4)."""
    fps_max_frames: Positive | None = None
    """Maximum number of frames sampled from a video file; null keeps the processor's value (768)."""
    video_min_pixels: Positive | None = None
    """Smallest area of a video, summed over its frames, in pixels; null keeps the processor's value."""
    video_max_pixels: Positive | None = None
    """Largest area of a video, summed over its frames, in pixels; null keeps the processor's value. Two frames share a
    token of 32 x 32."""
    video_frame_max_pixels: Positive | None = None
    """Largest area of one frame, in pixels, rounded down to whole tokens; null sets no limit per frame."""
    system_prompt: str | None = None
    """System message for conversations that have none."""
    tools_prompt: list[dict[str, Any]] | str | None = None
    """Function schemas for conversations that have none: a list or one schema (YAML or JSON), or a .json or .jsonl file
    of them."""
    add_vision_id: bool = False
    """Have the chat template number images and videos (Picture 1: ...)."""
    enable_thinking: bool = False
    """For thinking models: whether a prompt asks for reasoning (evaluation and prediction). false ends it with an empty
    think block, which is how the chat template begins answers of records without reasoning."""


@dataclass(kw_only=True)
class Sources:
    """Training and evaluation data."""

    train: str | list[str] | dict[str, PositiveFloat] = ""
    """Training data: registered names, files or folders, with an optional sampling rate in percent (a%50,b,my.jsonl),
    or a mapping from name to weight."""
    val: str | list[str] | dict[str, str | list[str]] | None = None
    """Evaluation data in the same form, or a mapping from name to selection for one loss each (eval_NAME_loss). With
    it, training.eval_strategy defaults to steps and eval_steps to save_steps."""
    split_dataset_ratio: Fraction = 0.0
    """Without val, share of the training records held out for evaluation; the same records on every rank."""
    train_dataset_sample: Count = -1
    """Maximum number of training records, drawn from all of them; -1 takes all."""
    val_dataset_sample: Count = -1
    """Maximum number of records drawn from each validation set; -1 takes all."""
    train_dataset_mix_ratio: NonNegativeFloat = 0.0
    """Number of records of train_dataset_mix_ds per training record. Records repeat if there are too few."""
    train_dataset_mix_ds: str | list[str] | None = None
    """Data to mix in, written as in train; null takes all datasets of train but the first."""
    loss_weights: dict[str, NonNegativeFloat] = field(default_factory=dict)
    """Weight of each dataset's tokens in the training loss, a weighted mean: dataset name in train -> weight; 1 if not
    named."""
    media_root: str | None = None
    """Folder that relative media paths start from; null means the folder of the annotation file."""
    media_outside_root: Literal["allow", "error"] | None = None
    """Whether a record's media may be outside the folder that relative paths start from: error refuses whatever leads
    out of it (absolute paths, .., symbolic links), for records that others wrote; allow refuses nothing. null refuses
    relative paths that climb by .. out of a folder that media_root or a dataset's data_path names."""
    allow_urls: bool = False
    """Fetch images from http(s) URLs."""
    datasets: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Dataset names to register: name -> {annotation_path: file, data_path: folder, reader: format}. An entry may also
    set high_bit_depth, window and image_frame for its images."""
    datasets_root: str | None = None
    """Folder that the relative paths in datasets start from; null means the working directory."""
    readers: dict[str, str] = field(default_factory=dict)
    """Your own record formats: name -> module:function that reads a record. They are tried before the built-in ones."""
    label: Literal["error", "keep_true"] = "error"
    """What to do with records whose label is false, the wrong answers of preference data: error stops, keep_true leaves
    them out and counts them."""
    ignored_keys: list[str] = field(default_factory=list)
    """Keys of records, turns and parts that are taken as absent. Name a key here if an error says that it changes what
    the record means and that nothing reads it."""
    dataset_num_proc: Positive = 4
    """Number of processes that measure sample lengths before training."""


@dataclass(kw_only=True)
class Streaming:
    """Training data that are read shard by shard, see docs/streaming.md."""

    streaming: bool = False
    """Read train as a stream of shards (paths, URLs, addresses of object stores, {000..123}, *) and plan one window of
    records after the other. Needs training.max_steps."""
    stream_window: Positive = 10_000
    """Records of a window, which are shuffled, packed and balanced together."""
    stream_rounds: Positive | None = None
    """Times to read all shards; null goes on until training.max_steps. Whichever comes first ends the run."""
    stream_cache: str | None = None
    """Folder for the copies of the shards of the latest windows, on a local disk; null is a folder beside the caches of
    datasets."""


@dataclass(kw_only=True)
class MediaLimits:
    """How images are read, and limits for images and videos."""

    high_bit_depth: Literal["error", "window", "minmax", "percentile", "clip"] = "error"
    """How image values deeper than 8 bits (16-bit, 32-bit and float files, DICOM, NIfTI) become 8 bits: error refuses
    them; window maps the two values of data.window to 0 and 255; minmax and percentile (0.5 and 99.5) take them from
    each image; clip cuts at 0 and 255. Entries of datasets, records and parts may set their own."""
    window: list[float] | None = None
    """Lowest and highest value for high_bit_depth: window, as [-160, 240]; null takes a DICOM file's own."""
    image_frame: NonNegative | None = None
    """Frame, page or slice to show of an image file with several, counted from 0; null takes the first and reports it
    (a NIfTI volume needs a number)."""

    max_image_pixels: Positive = 200_000_000
    """Largest image file that is decoded, in pixels; protects against decompression bombs."""
    image_timeout: PositiveFloat = 60.0
    """Time limit for decoding the images of one sample, in seconds."""
    video_timeout: PositiveFloat = 60.0
    """Time limit for decoding one video file, in seconds."""


@dataclass(kw_only=True)
class DenseCaptions:
    """Dense captions: images with described objects and their coordinates."""

    images_per_user_turn: Positive = 2
    """Number of records per group: one user turn asks about them, one JSON object answers."""
    emit_norm: Literal["none", "norm100", "norm1000"] = "norm1000"
    """Coordinates in answers: in pixels (none), or relative to the image's sides from 0 to 100 or 0 to 1000."""
    summary_ratio: Share | None = None
    """Share of the groups that are asked for a one-line summary of each image instead of its objects."""
    label_pattern: str = "图片_{i}"
    """Name of the i-th image of a group: it precedes the image and is its key in the answer."""
    object_pattern: str = "object_{i}"
    """Key of an image's i-th object."""
    object_order: Literal["given", "reading"] | None = None
    """Order of the objects: as in the record (given), or from top to bottom (reading). null is given in scheme A and
    reading in B."""
    augmentation: dict[str, Any] | None = None
    """Training-time augmentation of images and of their objects' coordinates; see docs/augmentation.md."""


@dataclass(kw_only=True)
class BadRecords:
    """Records that cannot be read."""

    max_record_bytes: Positive = 16_000_000
    """Most text of a record, in bytes; protects memory. A record with more cannot be read. Images and videos in it
    (bytes, or base64 in its JSON) are not text. The same limit holds for a conversation of several records."""
    on_error: Literal["raise", "skip"] = "raise"
    """raise stops the run at an unreadable record; skip leaves it out, counts it and reports it."""
    max_bad_fraction: Share | None = None
    """Share of unreadable samples per epoch above which a run that leaves them out stops anyway. null is 0.01 with
    on_error: skip, and 1 (no limit) with check_dataset_strategy: warning."""
    check_dataset_strategy: Literal["none", "warning", "error"] = "none"
    """Check every record before training, as qwenvl-ft check does: warning reports faults and leaves out what cannot be
    read, as on_error: skip does; error refuses to start."""

    @property
    def skips_unreadable(self) -> bool:
        """True if records that cannot be read are left out and counted."""
        return self.on_error == "skip" or self.check_dataset_strategy == "warning"

    @property
    def bad_limit(self) -> float:
        """Largest share of an epoch's samples that may be left out as unreadable."""
        if self.max_bad_fraction is not None:
            return self.max_bad_fraction
        return 1.0 if self.check_dataset_strategy == "warning" else 0.01


@dataclass(kw_only=True)
class DataConfig(Sources, Streaming, MediaLimits, DenseCaptions, BadRecords):
    """Data to train and evaluate on."""

    @property
    def evaluates(self) -> bool:
        """True if there is data for evaluation."""
        return bool(self.val) or self.split_dataset_ratio > 0


@dataclass(kw_only=True)
class PromptsConfig:
    """Prompts of dense captions. Each is a text, or the path of a .txt file."""

    scheme: Literal["A", "B", "a", "b"] = "A"
    """Built-in prompts: A describes the output format; B also says how to order, word and outline objects."""
    system: str | None = None
    """System prompt of groups that are asked for objects; null uses the scheme's."""
    user: str | None = None
    """User prompt of groups that are asked for objects; null uses the scheme's."""
    system_summary: str | None = None
    """System prompt of groups that are asked for summaries; null uses the scheme's."""
    user_summary: str | None = None
    """User prompt of groups that are asked for summaries; null uses the scheme's."""
