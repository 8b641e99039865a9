"""Which tool was a command line written for? Its flags tell."""

from collections.abc import Iterable

MARKS: dict[str, tuple[str, ...]] = {
    "axolotl": ("base_model", "micro_batch_size", "sequence_len", "sample_packing", "num_epochs", "lora_target_linear"),
    "LLaMA-Factory": (
        "stage",
        "finetuning_type",
        "lora_target",
        "cutoff_len",
        "dataset_dir",
        "freeze_multi_modal_projector",
    ),
    "2U1": (
        "model_id",
        "data_path",
        "image_folder",
        "freeze_merger",
        "vision_lora",
        "vision_lr",
        "merger_lr",
        "lora_namespan_exclude",
        "num_lora_modules",
        "unfreeze_topk_vision",
        "disable_flash_attn2",
        "use_liger",
        "bits",
    ),
    "train_qwen.py": (
        "dataset_use",
        "eval_dataset_use",
        "model_name_or_path",
        "tune_mm_llm",
        "tune_mm_vision",
        "tune_mm_mlp",
        "data_flatten",
        "data_packing",
        "model_max_length",
        "max_seq_length",
        "mm_projector_lr",
        "vision_tower_lr",
        "use_lora",
        "lora_enable",
        "lora_r",
        "train_modules",
        "train_mlp",
        "freeze_vision",
        "video_max_frames",
        "video_min_frames",
        "video_fps",
    ),
    "ms-swift": (
        "dataset",
        "val_dataset",
        "jsonl",
        "train_jsonl",
        "val_jsonl",
        "train_type",
        "sft_type",
        "tuner_type",
        "padding_free",
        "freeze_llm",
        "freeze_vit",
        "freeze_aligner",
    ),
}
"""Tool -> flags that show that a command line was written for it. The first tool of which a mark is given counts:
ms-swift comes last, because many of its flags are also ours."""


def dialect_of(flags: Iterable[str]) -> str | None:
    """Return the tool that a command line with these flags was written for, or None."""
    given = set(flags)
    return next((name for name, marks in MARKS.items() if given.intersection(marks)), None)
