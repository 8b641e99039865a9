"""Other names for our keys, in one table: flags of ms-swift and train_qwen.py, and older spellings.

An entry of `ALIASES` works as a flag (``--lora_r 8``), as an override (``tuner.lora_r=8``) and in a file, in the
section of the key that it sets. A name that is neither an alias, nor one of our keys, nor a field of TrainingArguments
is an error with a suggestion.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

from qwenvl_ft.errors import RecipeError, hint
from qwenvl_ft.recipe.keys import argument_types, bare_names, type_of
from qwenvl_ft.recipe.values import NULLS, convert

Values = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Alias:
    """Another name for one or more of our keys."""

    keys: tuple[str, ...]
    """Dotted keys that it sets."""
    kind: Any
    """Type of its value; None if that is the type of its only key."""
    meaning: Callable[[Any, str], Values]
    """(value, where it was set, for error messages) -> dotted key -> value."""
    effect: str
    """Note for docs/reference.md on how its value sets those keys; empty if the value is passed on unchanged."""
    also: tuple[str, ...] = ()
    """Sections in which it may stand, besides those of its keys."""

    @property
    def sections(self) -> set[str]:
        """The sections of a recipe in which the name may stand."""
        return {key.partition(".")[0] for key in self.keys} | set(self.also)


def same(key: str, also: tuple[str, ...] = ()) -> Alias:
    """Return an alias that passes its value on unchanged."""
    return Alias(keys=(key,), kind=None, meaning=lambda value, where: {key: value}, effect="", also=also)


def negated(key: str) -> Alias:
    """Return a boolean alias with the opposite value of its key: it trains what the key freezes."""
    return Alias(
        keys=(key,), kind=bool, meaning=lambda value, where: {key: not convert(value, bool, where)}, effect="negated"
    )


def chosen(key: str, yes: Any, no: Any) -> Alias:
    """Return a boolean alias that sets a key to one of two values."""
    return Alias(
        keys=(key,),
        kind=bool,
        meaning=lambda value, where: {key: yes if convert(value, bool, where) else no},
        effect=f"true is {yes}, false is {no}",
    )


def _optimizer(value: Any, where: str) -> Values:
    grouped = ("multimodal", "lorap", "galore")
    return {"training.optimizer": value} if value in grouped else {"training.optim": value}


def _deepspeed(value: Any, where: str) -> Values:
    if value is None or value in NULLS or value == "":
        return {"deepspeed.enabled": False}
    return {"deepspeed.enabled": True, "deepspeed.config": value}


def _warmup_ratio(value: Any, where: str) -> Values:
    return {"training.warmup_steps": convert(value, Annotated[float, "0..1"], where)}


def _resume_only_model(value: Any, where: str) -> Values:
    return {"training.resume_weights_only": convert(value, bool, where)}


def _train_mlp(value: Any, where: str) -> Values:
    if not convert(value, bool, where):
        return {"tuner.freeze_aligner": True}
    return {"tuner.freeze_aligner": False, "tuner.modules_to_save": list(MERGERS)}


def _data_flatten(value: Any, where: str) -> Values:
    return {"training.padding_free": True} if convert(value, bool, where) else {}


def _debug(value: Any, where: str) -> Values:
    return {"training.log_level": "debug"} if value in (True, "true", "True") else {"training.debug": value}


def tokens(key: str) -> Alias:
    """Return an alias that gives an area in tokens of 32 x 32 pixels."""
    return Alias(
        keys=(key,),
        kind=int,
        meaning=lambda value, where: {key: convert(value, Annotated[int, ">0"], where) * TOKEN_PIXELS},
        effect=f"tokens of {TOKEN_PIXELS} pixels each",
    )


TOKEN_PIXELS = 32 * 32
"""Number of pixels per token of Qwen3-VL: patches of 16 x 16, merged 2 x 2."""
MERGERS = ("model.visual.merger", "model.visual.deepstack_merger_list")
"""Modules of the aligner in Qwen3-VL."""

ALIASES: dict[str, Alias] = {
    # ms-swift
    "model": same("model.model"),
    "dataset": same("data.train"),
    "val_dataset": same("data.val"),
    "group_by_length": chosen("training.train_sampling_strategy", "group_by_length", "random"),
    "dataset_test_ratio": same("data.split_dataset_ratio"),
    "jsonl": same("data.train"),
    "train_jsonl": same("data.train"),
    "val_jsonl": same("data.val"),
    "system": same("template.system_prompt"),
    "template_type": same("template.template"),
    "user_prompt": same("prompts.user", also=("data",)),
    "system_prompt_summary": same("prompts.system_summary", also=("data",)),
    "image_max_token_num": tokens("template.max_pixels"),
    "image_min_token_num": tokens("template.min_pixels"),
    "video_max_token_num": tokens("template.video_frame_max_pixels"),
    "sft_type": same("tuner.train_type"),
    "tuner_type": same("tuner.train_type"),
    "init_lora_weights": same("tuner.init_weights"),
    "optimizer": Alias(
        keys=("training.optimizer", "training.optim"),
        kind=str,
        meaning=_optimizer,
        effect="multimodal, lorap and galore set optimizer; any other name sets optim",
    ),
    "deepspeed": Alias(
        keys=("deepspeed.enabled", "deepspeed.config"),
        kind=str | dict[str, Any] | None,
        meaning=_deepspeed,
        effect="a preset, file or mapping enables DeepSpeed; null disables it",
        also=("training",),
    ),
    "zero_hpz_partition_size": same("deepspeed.zero_hpz_partition_size", also=("training",)),
    "resume_only_model": Alias(
        keys=("training.resume_weights_only",),
        kind=bool,
        meaning=_resume_only_model,
        effect="steps and data begin anew too",
    ),
    "debug": Alias(
        keys=("training.log_level", "training.debug"),
        kind=bool | str,
        meaning=_debug,
        effect="without a value, log_level is debug",
    ),
    # train_qwen.py, qwen-vl-finetune
    "model_name_or_path": same("model.model"),
    "dataset_use": same("data.train"),
    "eval_dataset_use": same("data.val"),
    "model_max_length": same("template.max_length"),
    "max_seq_length": same("template.max_length"),
    "video_fps": same("template.fps"),
    "video_max_frames": same("template.fps_max_frames"),
    "video_min_frames": same("template.fps_min_frames"),
    "use_lora": chosen("tuner.train_type", "lora", "full"),
    "lora_enable": chosen("tuner.train_type", "lora", "full"),
    "lora_r": same("tuner.lora_rank"),
    "train_modules": same("tuner.target_modules"),
    "tune_mm_llm": negated("tuner.freeze_llm"),
    "tune_mm_vision": negated("tuner.freeze_vit"),
    "tune_mm_mlp": negated("tuner.freeze_aligner"),
    "train_mlp": Alias(
        keys=("tuner.freeze_aligner", "tuner.modules_to_save"),
        kind=bool,
        meaning=_train_mlp,
        effect="true trains all mergers in full, also beside adapters",
    ),
    "freeze_vision": same("tuner.freeze_vit"),
    "mm_projector_lr": same("training.aligner_lr"),
    "vision_tower_lr": same("training.vit_lr"),
    "data_packing": same("training.packing"),
    "data_flatten": Alias(
        keys=("training.padding_free",),
        kind=bool,
        meaning=_data_flatten,
        effect="true joins the samples of a batch; false has no effect",
    ),
    # older spellings of TrainingArguments
    "evaluation_strategy": same("training.eval_strategy"),
    "warmup_ratio": Alias(
        keys=("training.warmup_steps",),
        kind=float,
        meaning=_warmup_ratio,
        effect="a share of all steps, below 1",
    ),
    "gradient_checkpointing": same("training.activation_checkpointing"),
    "gradient_checkpointing_kwargs": same("training.activation_checkpointing_kwargs"),
}
"""Other name -> the keys that it sets."""

ENVIRONMENT = {
    "MAX_PIXELS": "max_pixels",
    "MIN_PIXELS": "min_pixels",
    "IMAGE_MAX_TOKEN_NUM": "image_max_token_num",
    "IMAGE_MIN_TOKEN_NUM": "image_min_token_num",
    "VIDEO_MAX_TOKEN_NUM": "video_max_token_num",
    "VIDEO_MAX_PIXELS": "video_frame_max_pixels",
    "VIDEO_TOTAL_PIXELS": "video_max_pixels",
    "FPS": "fps",
    "FPS_MAX_FRAMES": "fps_max_frames",
    "FPS_MIN_FRAMES": "fps_min_frames",
    "ROOT_IMAGE_DIR": "data.media_root",
}
"""Environment variable of ms-swift and qwen-vl-utils -> key or alias in ``template``, or a dotted key. They override
files, and command line arguments override them. VIDEO_MAX_PIXELS is the area of one frame, as in those tools."""

_QUANTISED_LATER = (
    "GPTQ and AWQ quantise a trained model. Remove it, train, then run: qwenvl-ft merge OUTPUT_DIR NEW --quant-method "
    "gptq --quant-bits 4 --group-size 128 --dataset my.jsonl. To train over 4-bit weights (bnb): --quantization_bit 4."
)
_LAYERS_SPLIT = (
    "layers are not split over GPUs. Remove it; for a model that is too large for one GPU: training.fsdp=full_shard or "
    "deepspeed.config=zero3, on several nodes also training.parallelism_config.dp_shard_size=GPUS_OF_A_NODE."
)
_SAMPLES_SPLIT = (
    "samples are not split over GPUs in this way. Remove it; for rows that are too long for one GPU: "
    "training.sequence_parallel_size."
)
_EXPERTS_SPLIT = (
    "experts are not distributed over GPUs as wholes. Remove it; training.fsdp=full_shard and deepspeed.config=zero3 "
    "shard them with all other weights."
)
REMOVED = {
    **dict.fromkeys(("tensor_parallel_size", "tensor_model_parallel_size", "tp_size"), _LAYERS_SPLIT),
    **dict.fromkeys(("pipeline_parallel_size", "pipeline_model_parallel_size", "pp_size"), _LAYERS_SPLIT),
    **dict.fromkeys(("context_parallel_size", "cp_size"), _SAMPLES_SPLIT),
    **dict.fromkeys(("expert_parallel_size", "expert_model_parallel_size", "ep_size"), _EXPERTS_SPLIT),
    **dict.fromkeys(("expert_tensor_parallel_size", "etp_size"), _EXPERTS_SPLIT),
    "overwrite_output_dir": "a run writes to output_dir even if files are there. Remove it.",
    "save_safetensors": "checkpoints are always safetensors. Remove it.",
    "quant_method": _QUANTISED_LATER,
    "quant_bits": _QUANTISED_LATER,
    "quant_n_samples": _QUANTISED_LATER,
    "gptq_group_size": _QUANTISED_LATER,
}
"""Setting of other tools without a key of ours -> what to do instead."""

SAME_ANYWAY = dict.fromkeys((name for name in REMOVED if name.endswith(("parallel_size", "p_size"))), 1)
"""Setting in `REMOVED` -> the value that changes nothing (one GPU holds the whole), which is accepted."""


def is_same_anyway(name: str, value: Any, where: str) -> bool:
    """Return True if a setting of another tool has the value that describes what happens here anyway."""
    same = SAME_ANYWAY.get(name)
    try:
        return same is not None and convert(value, type(same), where) == same
    except RecipeError:
        return False


FILES = {"recipe": "recipe", "config": "recipe", "base_config": "base"}
"""Argument that names a recipe file -> its role: keys of the recipe override those of the base."""


def alias_in(section: str, name: str) -> Alias | None:
    """Return the alias ``name`` if it may stand in this section, else None."""
    alias = ALIASES[name] if name in ALIASES else None
    return alias if alias is not None and section in alias.sections else None


def flag_type(flag: str) -> Any:
    """Return the type of a flag's value.

    Raises:
        RecipeError: the flag is unknown.
    """
    if flag in FILES:
        return str
    if flag in ALIASES:
        alias = ALIASES[flag]
        return alias.kind if alias.kind is not None else type_of(alias.keys[0])
    if flag in REMOVED and flag not in bare_names():
        return type(SAME_ANYWAY.get(flag, ""))
    return type_of(_flag_key(flag))


def flag_values(flag: str, value: Any, where: str) -> Values:
    """Return the dotted keys and values that ``--flag value`` sets.

    Raises:
        RecipeError: the flag is unknown, or its value is wrong.
    """
    if flag in ALIASES:
        return ALIASES[flag].meaning(value, where)
    return {} if is_same_anyway(flag, value, where) else {_flag_key(flag): value}


def _flag_key(flag: str) -> str:
    if "." in flag:
        return flag
    if flag in bare_names():
        return bare_names()[flag]
    if flag in argument_types():
        return f"training.{flag}"
    if flag in REMOVED:
        raise RecipeError(f"--{flag}: {REMOVED[flag]}")
    close = hint(flag, [*FILES, *ALIASES, *bare_names(), *argument_types()]).split(" Known:")[0]
    raise RecipeError(f"unknown flag --{flag}.{close} docs/reference.md lists all keys.")
