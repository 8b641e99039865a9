"""Which of our keys are LLaMA-Factory's (0.9.5), and which files does its dataset_info.json name?"""

import json
from pathlib import Path
from typing import Any

from qwenvl_ft.errors import RecipeError, unknown_name
from qwenvl_ft.recipe.foreign import Entry, Tool, Values, is_null
from qwenvl_ft.recipe.values import convert

COLUMNS = {
    "messages": ("messages", "conversations"),
    "prompt": ("instruction", "prompt"),
    "query": ("input", "query"),
    "response": ("output", "response"),
    "history": ("history",),
    "system": ("system",),
    "tools": ("tools",),
    "images": ("images", "image"),
    "videos": ("videos", "video"),
}
"""Column in dataset_info.json -> names that our readers know for it."""
TAGS = {
    "role_tag": ("from", "role"),
    "content_tag": ("value", "content"),
    "user_tag": ("human", "user"),
    "assistant_tag": ("gpt", "assistant"),
    "observation_tag": ("observation", "tool"),
    "function_tag": ("function_call",),
    "system_tag": ("system",),
}
"""Tag in dataset_info.json -> names that our readers know for it."""
ATTENTION = {
    "auto": "auto",
    "disabled": "eager",
    "sdpa": "sdpa",
    "fa2": "flash_attention_2",
    "fa3": "flash_attention_3",
}


def _names(value: Any) -> list[str]:
    return [str(name).strip() for name in (value.split(",") if isinstance(value, str) else value)]


def _data(theirs: Values, where: str) -> Values:
    """Return the data sets, registered with the files that dataset_info.json names."""
    if is_null(theirs.get("dataset")):
        return {}
    folder = str(theirs.get("dataset_dir") or "data")
    listing = Path(folder) / "dataset_info.json"
    if folder == "ONLINE" or folder.startswith("REMOTE:"):
        raise RecipeError(f"{where}: dataset_dir: {folder} is not a folder. Download the data and name their folder.")
    try:
        known = json.loads(listing.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecipeError(f"{where}: dataset_dir: {listing} cannot be read: {error}. Set dataset_dir.") from None
    count = theirs.get("max_samples")
    most = "" if is_null(count) else f"#{convert(count, int, f'{where}: max_samples')}"
    values: Values = {}
    for theirs_key, our_key in (("dataset", "data.train"), ("eval_dataset", "data.val")):
        chosen = [] if is_null(theirs.get(theirs_key)) else _names(theirs[theirs_key])
        for name in chosen:
            if name not in known:
                raise unknown_name(f"data set of {listing}", name, known)
            values[f"data.datasets.{name}.annotation_path"] = str(
                Path(folder) / _file(known[name], f"{listing}: {name}")
            )
            values[f"data.datasets.{name}.data_path"] = str(theirs.get("media_dir") or folder)
        if chosen:
            values[our_key] = [f"{name}{most}" for name in chosen]
    return values


def _file(entry: Values, where: str) -> str:
    """Return the file of a data set whose records our readers know."""
    if entry.get("ranking"):
        raise RecipeError(f"{where}: ranking: true is preference data, from which this package does not train.")
    if "file_name" not in entry:
        raise RecipeError(f"{where} names no file. Download it, and set file_name.")
    for kind, known in (("columns", COLUMNS), ("tags", TAGS)):
        for key, name in (entry.get(kind) or {}).items():
            if name is not None and name not in known.get(key, ()):
                allowed = " or ".join(known.get(key, ())) or "nothing"
                raise RecipeError(f"{where}: {kind}.{key}={name} is not read. Rename it in the records: {allowed}.")
    for key in ("num_samples", "subset", "folder"):
        if entry.get(key) is not None:
            raise RecipeError(f"{where}: {key} is not read. Use max_samples, or write the chosen records to a file.")
    return str(entry["file_name"])


def _method(entry: Entry) -> Values:
    if entry.value not in ("lora", "full"):
        raise entry.refuse(
            "is not mapped. In a recipe: tuner.train_type=full with tuner.unfreeze_topk_llm for freeze, "
            "tuner.train_type=oft with tuner.peft_options for oft."
        )
    return {"tuner.train_type": entry.value}


def _targets(entry: Entry) -> Values:
    names = _names(entry.value)
    return {"tuner.target_modules": ["all-linear"] if names == ["all"] else names}


def _pissa(entry: Entry) -> Values:
    rounds = entry.other("pissa_iter", 16)
    return {"tuner.init_weights": f"pissa_niter_{rounds}" if rounds > 0 else "pissa"} if entry.yes else {}


def _template(entry: Entry) -> Values:
    if not str(entry.value).startswith("qwen"):
        raise entry.refuse("is not a template of a Qwen-VL model. The processor's own chat template is used.")
    return {}


def _attention(entry: Entry) -> Values:
    if str(entry.value) not in ATTENTION:
        raise entry.refuse(f"is not one of {', '.join(ATTENTION)}.")
    return {"model.attn_impl": ATTENTION[str(entry.value)]}


def _share(entry: Entry) -> Values:
    size = convert(entry.value, float, entry.where)
    if size >= 1:
        raise entry.refuse("is a number of records. Give a share below 1, or name files: eval_dataset.")
    return {"data.split_dataset_ratio": size}


def _packing(entry: Entry) -> Values:
    return {"training.packing": entry.yes or entry.other("neat_packing", False)}


_OFF = (False,)
_NOT_HERE = "this package does not have it. Leave it out."
_ABSENT = (
    "create_new_adapter",
    "use_badam",
    "use_adam_mini",
    "use_mca",
    "use_hyper_parallel",
    "use_muon",
    "use_dft_loss",
    "use_asft_loss",
    "use_eaft_loss",
    "disable_shuffling",
    "pure_bf16",
    "fp8",
    "resize_vocab",
    "split_special_tokens",
    "use_unsloth",
    "use_unsloth_gc",
    "use_kt",
    "train_from_scratch",
    "upcast_lmhead_output",
    "image_do_pan_and_scan",
    "crop_to_patches",
    "use_audio_in_video",
    "enable_torch_profiler",
    "pissa_convert",
    "use_v1_kernels",
)
"""Switches of what this package does not have."""
_IRRELEVANT = (
    "cache_dir",
    "use_fast_tokenizer",
    "init_special_tokens",
    "low_cpu_mem_usage",
    "use_reentrant_gc",
    "upcast_layernorm",
    "offload_folder",
    "use_kv_cache",
    "print_param_status",
    "trust_remote_code",
    "overwrite_cache",
    "overwrite_output_dir",
    "preprocessing_batch_size",
    "buffer_size",
    "ignore_pad_token_for_loss",
    "data_shared_file_system",
    "plot_loss",
    "compute_accuracy",
    "include_effective_tokens_per_second",
    "pissa_iter",
    "asft_alpha",
    "eaft_alpha",
    "adapter_folder",
    "enable_thinking",
    "preserve_thinking",
    "audio_sampling_rate",
    "profile_modules",
    "master_addr",
    "master_port",
    "hyper_parallel_args",
    "compute_dtype",
    "model_max_length",
    "block_diag_attn",
    "do_eval",
    "ld_alpha",
    "dpo_label_smoothing",
    "module_dropout",
    "oft_rank",
    "oft_block_size",
    "oft_target",
    "eval_num_beams",
    "swanlab_workspace",
    "swanlab_run_name",
    "swanlab_logdir",
    "swanlab_lark_webhook_url",
    "swanlab_lark_secret",
    "hf_hub_token",
    "ms_hub_token",
    "om_hub_token",
    "freeze_trainable_*",
    "freeze_extra_*",
    "pref_*",
    "kto_*",
    "ppo_*",
    "simpo_*",
    "ref_model*",
    "reward_model*",
    "galore_*",
    "apollo_*",
    "badam_*",
    "export_*",
    "vllm_*",
    "sglang_*",
    "infer_*",
    "kt_*",
    "profiler_*",
    "fp8_*",
    "ray_*",
    "generation_*",
)
"""Keys that change no result: speed, caches, other stages, export and serving."""
LLAMA_FACTORY = Tool(
    names={
        "model_name_or_path": "model.model",
        "model_revision": "model.model_revision",
        "adapter_name_or_path": "tuner.resume_from_checkpoint",
        "rope_scaling": "model.rope_scaling",
        "flash_attn": _attention,
        "finetuning_type": _method,
        "lora_rank": "tuner.lora_rank",
        "lora_alpha": "tuner.lora_alpha",
        "lora_dropout": "tuner.lora_dropout",
        "lora_target": _targets,
        "additional_target": lambda entry: {"tuner.modules_to_save": _names(entry.value)},
        "loraplus_lr_ratio": "training.lorap_lr_ratio",
        "use_rslora": "tuner.use_rslora",
        "use_dora": "tuner.use_dora",
        "pissa_init": _pissa,
        "freeze_vision_tower": "tuner.freeze_vit",
        "freeze_multi_modal_projector": "tuner.freeze_aligner",
        "freeze_language_model": "tuner.freeze_llm",
        "quantization_bit": "quantization.quantization_bit",
        "quantization_type": "quantization.bnb_4bit_quant_type",
        "double_quantization": "quantization.bnb_4bit_use_double_quant",
        "template": _template,
        "default_system": "template.system_prompt",
        "cutoff_len": "template.max_length",
        "packing": _packing,
        "neat_packing": lambda entry: {"training.packing": True} if entry.yes else {},
        "val_size": _share,
        "preprocessing_num_workers": "data.dataset_num_proc",
        "image_max_pixels": "template.max_pixels",
        "image_min_pixels": "template.min_pixels",
        "video_max_pixels": "template.video_frame_max_pixels",
        "video_fps": "template.fps",
        "video_maxlen": "template.fps_max_frames",
        "enable_liger_kernel": "training.use_liger_kernel",
        "disable_gradient_checkpointing": lambda entry: {"training.activation_checkpointing": not entry.yes},
        "early_stopping_steps": "training.early_stopping_patience",
        "swanlab_project": "training.swanlab_project",
        "swanlab_mode": "training.swanlab_mode",
        "swanlab_api_key": "training.swanlab_token",
    },
    only={
        "stage": (("sft",), "this package only trains on answers. Preferences and rewards need LLaMA-Factory."),
        "train_on_prompt": (_OFF, "only answers are learned. Leave it out."),
        "mask_history": (_OFF, "all answers of a conversation are learned. Split it into records instead."),
        "streaming": (_OFF, "an epoch is planned from the lengths of all records. Leave it out."),
        "mix_strategy": (("concat",), "use weights: data.train={a: 3, b: 1} in a recipe."),
        "interleave_probs": ((), "use weights: data.train={a: 3, b: 1} in a recipe."),
        "video_min_pixels": ((256,), "frames have no lower limit. Leave it out."),
        "quantization_method": (
            ("bnb",),
            "only bitsandbytes quantises while loading. A quantised model is named itself.",
        ),
        "quantization_device_map": ((), "use model.device_map in a recipe."),
        "moe_aux_loss_coef": ((0, 0.0), "the loss has no such term. Leave it out."),
        "shift_attn": (_OFF, "use tuner.train_type=longlora in a recipe."),
        "use_llama_pro": (_OFF, "use tuner.train_type=llamapro in a recipe."),
        "use_galore": (_OFF, "use training.use_galore in a recipe: its settings have other names there."),
        "use_apollo": (_OFF, "use training.optim=apollo_adamw in a recipe."),
        "use_swanlab": (_OFF, "use report_to: swanlab."),
        "optim": (("adamw_torch", "adamw_torch_fused"), "set training.optim in a recipe or on the command line."),
        "eval_on_each_dataset": (_OFF, "use a mapping: data.val={a: a.jsonl} in a recipe."),
        "tool_format": ((), "tools follow the processor's own chat template. Leave it out."),
        "tokenized_path": ((), "samples are tokenised on demand. Leave it out."),
        "loraplus_lr_embedding": ((1e-6,), _NOT_HERE),
        "device_map": ((), "use model.device_map in a recipe."),
        "do_train": ((True,), "a recipe is always for training."),
        "do_predict": (_OFF, "use qwenvl-ft infer, or evaluation.run_after_training=true in a recipe."),
        "predict_with_generate": (_OFF, "use evaluation.run_after_training=true in a recipe."),
        "add_tokens": ((), _NOT_HERE),
        "add_special_tokens": ((), _NOT_HERE),
        "new_special_tokens_config": ((), _NOT_HERE),
        "mixture_of_depths": ((), _NOT_HERE),
        **dict.fromkeys(_ABSENT, (_OFF, _NOT_HERE)),
    },
    irrelevant=_IRRELEVANT,
    joint=_data,
    joint_keys=("dataset", "eval_dataset", "dataset_dir", "media_dir", "max_samples"),
)
