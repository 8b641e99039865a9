"""Everything a recipe can say: one dataclass a section, the help under each field, defaults here and nowhere else.

``training`` also takes every field of transformers' TrainingArguments; those that a recipe sets, and the defaults that
we change (`HF_DEFAULTS`), are in ``Recipe.training.arguments``.
"""

import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from omegaconf import OmegaConf

from qwenvl_ft.recipe.limits import Count, Fraction, NonNegative, NonNegativeFloat, Positive, PositiveFloat, Share
from qwenvl_ft.recipe.tuner import TunerConfig as TunerConfig


@dataclass(kw_only=True)
class ModelConfig:
    """Which model, and how it is loaded."""

    model: str = ""
    """Directory or hub id of a Qwen-VL model; needed for training."""
    model_type: str | None = None
    """A check: an error unless the model's config.json says the same (qwen3_vl, qwen3_vl_moe, ...)."""
    model_revision: str = "main"
    """Branch, tag or commit on the hub."""
    torch_dtype: Literal["bfloat16", "float16", "float32", "auto"] = "bfloat16"
    """Precision of the frozen weights and of the computation. Trained weights are held in float32."""
    attn_impl: Literal[
        "auto",
        "flash_attn",
        "flash_attention_2",
        "flash_attention_3",
        "flash_attention_4",
        "packed_sdpa",
        "sdpa",
        "eager",
    ] = "auto"
    """Attention; auto takes flash-attention where it runs, else torch's own on each sample (packed_sdpa)."""
    device_map: str | dict[str, Any] | None = None
    """auto, a device, or module names -> device; model.layers.0-15 stands for sixteen layers. One process only."""
    max_memory: dict[str, Any] | None = None
    """Device -> size with device_map, as {"0": "40GB", "cpu": "100GB"}."""
    max_model_len: Positive | None = None
    """Longest sequence to prepare for, in tokens; beyond the model's own only with rope_scaling."""
    rope_scaling: str | dict[str, Any] | None = None
    """linear, dynamic, yarn, or a dict with type and factor. M-RoPE's sections stay."""
    patch_embed: Literal["linear", "conv3d"] = "linear"
    """Patch embedding as a matrix product (the same weights, faster) or as the upstream convolution."""


@dataclass(kw_only=True)
class QuantizationConfig:
    """Weights in few bits, by bitsandbytes, to train an adapter over them."""

    quantization_bit: Literal[4, 8] | None = None
    """Bits of a weight; null quantises nothing."""
    quantized_parts: list[Literal["vision", "merger", "llm"]] = field(default_factory=lambda: ["llm"])
    """Parts whose Linear layers are quantised; embeddings, language head and experts never are."""
    bnb_4bit_comp_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """What 4-bit weights are multiplied in."""
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    """The 16 values of a 4-bit weight: spaced as a normal distribution, or as floating point."""
    bnb_4bit_use_double_quant: bool = True
    """Quantise the scales of 4-bit weights too."""


@dataclass(kw_only=True)
class TemplateConfig:
    """How conversations become tokens."""

    template: Literal["qwen3_vl", "qwen3_vl_moe", "qwen2_5_vl", "qwen2_vl", "qwen"] = "qwen3_vl"
    """Name from other libraries; the text is always that of the processor's own chat template."""
    max_length: Positive = 8192
    """Tokens of the longest sample, and of a packed row, images included."""
    truncation_strategy: Literal["raise", "delete", "left", "right"] = "delete"
    """A longer sample stops the run, is left out and counted, or loses that end; never a part of an image."""
    min_pixels: Positive | None = None
    """Smallest area of an image after resizing, in pixels; null is the processor's own."""
    max_pixels: Positive | None = None
    """Largest area of an image after resizing, in pixels; a token of Qwen3-VL covers 32 x 32 = 1024 of them."""
    fps: PositiveFloat | None = None
    """Frames a second that are taken of a video file; null is the processor's own (2)."""
    fps_min_frames: Positive | None = None
    """Fewest frames of a video file, if it has them; null is the processor's own (4)."""
    fps_max_frames: Positive | None = None
    """Most frames of a video file; null is the processor's own (768)."""
    video_min_pixels: Positive | None = None
    """Smallest area of a video, all its frames together, in pixels; null is the processor's own."""
    video_max_pixels: Positive | None = None
    """Largest area of a video, all its frames together, in pixels; two frames share a token of 32 x 32."""
    video_frame_max_pixels: Positive | None = None
    """Largest area of one frame, in pixels, rounded down to whole tokens; null is no limit of its own."""
    system_prompt: str | None = None
    """System message of conversations that have none."""
    tools_prompt: str | None = None
    """JSON list of function schemas, or a .json file with one, for conversations that have none."""
    add_vision_id: bool = False
    """Let the template number the media (Picture 1: ...)."""


@dataclass(kw_only=True)
class DataConfig:
    """What is trained and evaluated on."""

    train: str | list[str] | dict[str, PositiveFloat] = ""
    """Registered names, files or folders of datasets, with a rate in percent: a%50,b,my.jsonl; or name -> weight."""
    val: str | list[str] | dict[str, str | list[str]] | None = None
    """The same for evaluation, or name -> selection for a loss each (eval_NAME_loss). With it, training.eval_strategy
    is steps and eval_steps is save_steps if not given."""
    split_dataset_ratio: Fraction = 0.0
    """Without val, share of the training records held out for evaluation: the same ones on every rank."""
    train_dataset_sample: Count = -1
    """Most training records, drawn from all; -1 takes all."""
    val_dataset_sample: Count = -1
    """Most records of each validation set, drawn; -1 takes all."""
    train_dataset_mix_ratio: NonNegativeFloat = 0.0
    """Records of train_dataset_mix_ds for each training record; they repeat if there are too few."""
    train_dataset_mix_ds: str | list[str] | None = None
    """What is mixed in, as train; null is all data sets of train but the first."""
    loss_weights: dict[str, NonNegativeFloat] = field(default_factory=dict)
    """Name of a data set in train -> weight of its tokens in the training loss, a weighted mean; others 1."""
    media_root: str | None = None
    """Folder that relative media paths start at; null is the folder of the annotation file."""
    allow_urls: bool = False
    """Fetch images from http(s) URLs."""
    datasets: dict[str, dict[str, str]] = field(default_factory=dict)
    """Names to register: name -> {annotation_path: file, data_path: folder, reader: format}."""
    readers: dict[str, str] = field(default_factory=dict)
    """Formats of your own: name -> module:function of a record, asked before the built-in ones."""
    dataset_num_proc: Positive = 4
    """Processes that measure lengths before training."""
    max_image_pixels: Positive = 200_000_000
    """Largest stored image, in pixels; protects against decompression bombs."""
    image_timeout: PositiveFloat = 60.0
    """Seconds that decoding the images of one sample may take."""
    video_timeout: PositiveFloat = 60.0
    """Seconds that one video file may take to decode."""
    images_per_user_turn: Positive = 2
    """Dense captions: records that one user turn asks about and one JSON object answers."""
    emit_norm: Literal["none", "norm100", "norm1000"] = "norm1000"
    """Dense captions: coordinates of answers in pixels, or in hundredths or thousandths of the image's sides."""
    summary_ratio: Share | None = None
    """Dense captions: share of the groups that are asked for a line about each image instead of its objects."""
    label_pattern: str = "图片_{i}"
    """Dense captions: name of the i-th image of a group, written before it, and its key in the answer."""
    object_pattern: str = "object_{i}"
    """Dense captions: key of an image's i-th object."""
    object_order: Literal["given", "reading"] | None = None
    """Dense captions: objects as in the record, or from the top down; null is given in scheme A, reading in B."""
    augmentation: dict[str, Any] | None = None
    """What changes images, and their objects' coordinates with them, in training; see docs/augmentation.md."""
    on_error: Literal["raise", "skip"] = "raise"
    """A record that cannot be read stops the run, or is left out, counted and told."""
    max_bad_fraction: Share = 0.01
    """With on_error: skip, the share of an epoch's samples above which the run stops after all."""
    check_dataset_strategy: Literal["none", "warning", "error"] = "none"
    """Look at every record before training, as qwenvl-ft check does: say what is wrong, or do not begin."""

    @property
    def evaluates(self) -> bool:
        """Whether there is something to evaluate on."""
        return bool(self.val) or self.split_dataset_ratio > 0


@dataclass(kw_only=True)
class PromptsConfig:
    """What dense captions are asked. Each prompt is a text, or the path of a .txt file."""

    scheme: Literal["A", "B", "a", "b"] = "A"
    """Built-in prompts: A says the format, B also how to order, word and outline."""
    system: str | None = None
    """System prompt of groups that are asked for objects; null is the scheme's."""
    user: str | None = None
    """User prompt of groups that are asked for objects; null is the scheme's."""
    system_summary: str | None = None
    """System prompt of groups that are asked for summaries; null is the scheme's."""
    user_summary: str | None = None
    """User prompt of groups that are asked for summaries; null is the scheme's."""


@dataclass(kw_only=True)
class TrainingConfig:
    """The run. Every field of transformers' TrainingArguments can stand here too."""

    packing: bool = True
    """Fill rows of template.max_length tokens with whole samples that cannot see each other."""
    padding_free: bool = True
    """Join samples into one row instead of padding them; false only for comparison."""
    pack_dataset_break_mode: Literal["no_break_longest_only", "break"] = "no_break_longest_only"
    """How rows are filled: the longest sample first, each into the fullest row that takes it. Never split: break is an
    error."""
    lazy_tokenize: bool = False
    """true is an error: lengths are planned before the first step, and samples are tokenized when needed anyway."""
    logging_dir: str | None = None
    """Folder of TensorBoard's files; null is a new one in output_dir."""
    wandb_project: str | None = None
    """Project of Weights & Biases; null is WANDB_PROJECT of the environment, or huggingface."""
    wandb_entity: str | None = None
    """Account or team of Weights & Biases."""
    swanlab_project: str | None = None
    """Project of SwanLab."""
    swanlab_mode: Literal["cloud", "local", "offline", "disabled"] | None = None
    """Where SwanLab keeps a run."""
    swanlab_token: str | None = None
    """Key of SwanLab, as ${oc.env:NAME}; never printed or saved."""
    optimizer: Literal["multimodal", "lorap", "galore"] = "multimodal"
    """Parameter groups by part, each with its own learning rate; the algorithm is optim. lorap is that with
    lorap_lr_ratio (16 if not given), galore that with use_galore."""
    learning_rate: NonNegativeFloat | None = None
    """Of the language model, and of the parts below if they name none; null is 1e-4 for adapters, 1e-5 for full."""
    vit_lr: NonNegativeFloat | None = None
    """Of the vision tower."""
    aligner_lr: NonNegativeFloat | None = None
    """Of the merger and the deepstack mergers."""
    lorap_lr_ratio: PositiveFloat | None = None
    """LoRA+: LoRA's B matrices learn at this many times their part's rate, as 16."""
    use_galore: bool = False
    """GaLore: the optimizer keeps the gradients of Linear layers in a low rank. Full training, one process."""
    galore_target_modules: list[str] = field(default_factory=lambda: ["mlp", "self_attn"])
    """Linear layers whose gradients are projected: those with one of these in their names."""
    galore_rank: Positive = 128
    """Rank of the projection."""
    galore_update_proj_gap: Positive = 50
    """Steps between two projections."""
    galore_scale: PositiveFloat = 1.0
    """Factor of the projected update."""
    galore_proj_type: Literal["std", "reverse_std", "right", "left", "full"] = "std"
    """Side that is projected; std is the shorter one."""
    lisa_activated_layers: NonNegative = 0
    """LISA: layers of the language model that train at a time, drawn anew, as 2; 0 is all. Full training, one
    process."""
    lisa_step_interval: Positive = 20
    """Steps between two draws."""
    zero_gradient_steps: NonNegative = 20
    """Steps in a row without any gradient in a part that trains, after which a warning says why; 0 is never."""
    llm_gradient_checkpointing: bool | None = None
    """Compute the language model's layers again in the backward pass instead of keeping their activations; null is
    activation_checkpointing."""
    vit_gradient_checkpointing: bool | None = None
    """The same of the vision tower's layers."""
    z_loss: NonNegativeFloat = 0.0
    """Weight of the squared logarithm of each softmax's sum, added to the loss in training, as 1e-4; 0 is off."""
    early_stopping_patience: Positive | None = None
    """Evaluations without a better metric_for_best_model after which training ends."""
    resume_from_checkpoint: str | bool | None = None
    """true or auto for the last complete checkpoint of output_dir, or a checkpoint's folder."""
    save_final: bool = True
    """Write the trained model into output_dir at the end, beside the checkpoints of save_strategy."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """The fields of TrainingArguments, flat under training in the file."""


@dataclass(kw_only=True)
class DeepspeedConfig:
    """ZeRO sharding by DeepSpeed."""

    enabled: bool = False
    """Use it."""
    config: str | dict[str, Any] = "zero2"
    """zero2, zero2_offload, zero3, zero3_offload, a JSON file, or the config itself."""
    zero_hpz_partition_size: Positive | None = None
    """ZeRO++: GPUs that keep a second copy of the sharded weights among them, as those of a node; ZeRO-3 only."""


@dataclass(kw_only=True)
class EvaluationConfig:
    """Asking the model by generation."""

    run_after_training: bool = False
    """Answer the evaluation set once training is done."""
    data: str | list[str] | None = None
    """As data.val; null is data.val."""
    limit: Positive | None = None
    """Ask about the first so many records only."""
    metric: Literal["exact_match"] = "exact_match"
    """How an answer is scored."""
    max_new_tokens: Positive = 128
    """Longest answer."""
    batch_size: Positive = 8
    """Prompts that are answered together."""


SECTIONS: dict[str, type] = {
    "model": ModelConfig,
    "quantization": QuantizationConfig,
    "template": TemplateConfig,
    "data": DataConfig,
    "prompts": PromptsConfig,
    "tuner": TunerConfig,
    "training": TrainingConfig,
    "deepspeed": DeepspeedConfig,
    "evaluation": EvaluationConfig,
}
"""Section of a recipe -> its dataclass."""

HF_DEFAULTS: dict[str, Any] = {
    "output_dir": "output",
    "num_train_epochs": 3,
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "weight_decay": 0.01,
    "max_grad_norm": 1.0,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.05,
    "activation_checkpointing": True,
    "dataloader_num_workers": "auto",
    "dataloader_persistent_workers": True,
    "logging_steps": 10,
    "logging_first_step": True,
    "eval_strategy": "no",
    "save_strategy": "steps",
    "save_steps": 500,
    "save_total_limit": 2,
    "report_to": "tensorboard",
    "seed": 42,
}
"""Defaults of TrainingArguments that a fine-tuning run wants otherwise, or that a reader should see."""

MIN_LR_SCHEDULES = ("cosine_with_min_lr", "cosine_warmup_with_min_lr")
"""Values of ``training.lr_scheduler_type`` that end at a minimum learning rate."""

GALORE = {
    "adamw_torch": "galore_adamw",
    "adamw_torch_fused": "galore_adamw",
    "adamw_8bit": "galore_adamw_8bit",
    "adamw_bnb_8bit": "galore_adamw_8bit",
    "adafactor": "galore_adafactor",
}
"""``training.optim`` -> what it is with GaLore."""

HF_LIMITS: dict[str, str] = {
    "num_train_epochs": ">0",
    "max_steps": "steps or -1",
    "per_device_train_batch_size": ">0",
    "per_device_eval_batch_size": ">0",
    "gradient_accumulation_steps": ">0",
    "weight_decay": ">=0",
    "max_grad_norm": ">=0",
    "adam_beta1": "0..1",
    "adam_beta2": "0..1",
    "adam_epsilon": ">0",
    "label_smoothing_factor": "0..1",
    "neftune_noise_alpha": ">=0",
    "warmup_steps": "share or steps",
    "logging_steps": "some steps",
    "eval_steps": "some steps",
    "eval_delay": ">=0",
    "save_steps": "some steps",
    "save_total_limit": ">0",
    "dataloader_prefetch_factor": ">0",
    "seed": ">=0",
}
"""Fields of TrainingArguments that have limits; its annotations say none."""

LogLevel = Literal["passive", "detail", "debug", "info", "warning", "error", "critical"]
Tracker = Literal[
    "tensorboard",
    "wandb",
    "none",
    "all",
    "azure_ml",
    "clearml",
    "codecarbon",
    "comet_ml",
    "dagshub",
    "dvclive",
    "flyte",
    "kubeflow",
    "mlflow",
    "neptune",
    "swanlab",
    "trackio",
]

HF_TYPES: dict[str, Any] = {
    "output_dir": str,
    "dataloader_num_workers": NonNegative | Literal["auto"],
    "report_to": Tracker | list[Tracker] | None,
    "log_level": LogLevel,
    "log_level_replica": LogLevel,
    "dataloader_multiprocessing_context": Literal["fork", "spawn", "forkserver"] | None,
    "torch_compile_backend": Literal["inductor", "eager", "aot_eager", "cudagraphs", "hpu_backend"] | None,
    "torch_compile_mode": Literal["default", "lite", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]
    | None,
    "include_num_input_tokens_seen": Literal["no", "all", "non_padding"] | bool,
    "ddp_backend": Literal["nccl", "gloo", "mpi", "xccl", "ccl", "hccl", "cncl", "mccl"] | None,
}
"""Fields of TrainingArguments whose annotation there is any text -> what they may be."""

SECRETS = ("hub_token", "swanlab_token")
"""Keys under ``training`` that are never printed or saved. Give them as ${oc.env:NAME}."""

TOP_LEVEL = ("extends", "inherit", "global_max_length", *SECTIONS, "custom", "phases")
"""Keys at the top of a recipe file; ``inherit`` is ``extends``, ``custom`` is ``data``."""


@dataclass(kw_only=True)
class Recipe:
    """All of a run's settings, typed and checked."""

    model: ModelConfig
    quantization: QuantizationConfig
    template: TemplateConfig
    data: DataConfig
    prompts: PromptsConfig
    tuner: TunerConfig
    training: TrainingConfig
    deepspeed: DeepspeedConfig
    evaluation: EvaluationConfig
    global_max_length: int | None = None
    origins: dict[str, str] = field(default_factory=dict, compare=False)
    """``section.key`` -> the file that set it, or ``override``; keys that nobody set are not in it."""
    phases: list["Recipe"] = field(default_factory=list)
    """The recipe of each phase, all its settings; empty if the run has none."""
    phase: str = ""
    """Of a phase's recipe: which of how many it is, and its name, as ``2/3 medium``."""

    def to_dict(self) -> dict[str, Any]:
        """Sections as in a file: ``training`` flat, the top-level length only if it was given, no secrets.

        Of phases, what they have otherwise.
        """
        told: dict[str, Any] = {}
        if self.global_max_length is not None:
            told["global_max_length"] = self.global_max_length
        for name, section in SECTIONS.items():
            values = {f.name: getattr(getattr(self, name), f.name) for f in fields(section)}
            values |= values.pop("arguments", {})
            told[name] = {key: value for key, value in values.items() if key not in SECRETS}
        if self.phases:
            told["phases"] = [{"name": phase.phase.split()[1]} | _otherwise(phase, told) for phase in self.phases]
        return told

    def to_yaml(self) -> str:
        """A recipe file that resolves to this recipe."""
        return OmegaConf.to_yaml(OmegaConf.create(_escaped(self.to_dict())))

    def save(self, path: str | Path) -> None:
        """Write a recipe file that resolves to this recipe, with the versions that it was resolved by on top."""
        from qwenvl_ft.recipe.provenance import header

        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(".partial")
        partial.write_text(header() + self.to_yaml(), encoding="utf-8")
        partial.replace(target)

    def by_phase(self) -> "dict[str, Recipe]":
        """Folder's name -> recipe of each phase; of a recipe without phases, itself under an empty name."""
        return {Path(run.training.arguments["output_dir"]).name: run for run in self.phases} or {"": self}

    def origin(self, key: str) -> str:
        """Where a dotted key's value came from: a file, ``override`` or ``default``."""
        while "." in key and key not in self.origins:
            key = key.rpartition(".")[0]
        return self.origins[key] if key in self.origins else "default"


def _otherwise(phase: Recipe, base: dict[str, Any]) -> dict[str, Any]:
    """What a phase says otherwise than the recipe around it; folders follow from that."""
    own = phase.to_dict()
    told: dict[str, Any] = {}
    for name, values in own.items():
        if not isinstance(values, dict):
            told |= {name: values} if name not in base or values != base[name] else {}
            continue
        changed = {key: value for key, value in values.items() if key not in base[name] or value != base[name][key]}
        for key in ("output_dir", "logging_dir") if name == "training" else ():
            changed.pop(key, None)
        told |= {name: changed} if changed else {}
    return told


def _escaped(value: Any) -> Any:
    """Values that read as they are: a ``${`` in them is no interpolation."""
    if isinstance(value, dict):
        return {key: _escaped(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_escaped(inner) for inner in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value
