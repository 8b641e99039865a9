"""Which of our keys are the flags of 2U1/Qwen-VL-Series-Finetune (params.py and train_sft.py)?"""

import ast
from typing import Any

from qwenvl_ft.errors import RecipeError
from qwenvl_ft.recipe.dialects import MERGERS
from qwenvl_ft.recipe.foreign import Entry, Tool, Values
from qwenvl_ft.recipe.values import convert

PARTS = ("lora_enable", "vision_lora", "freeze_llm", "freeze_vision_tower", "freeze_merger")


def _parts(theirs: Values, where: str) -> Values:
    """Return method and frozen parts. Beside LoRA, what is not frozen trains in full, and the language model must be
    frozen: its adapters train."""

    def flag(name: str) -> bool:
        return bool(convert(theirs.get(name, False), bool, f"{where}: {name}"))

    lora, vision_lora, *frozen = (flag(name) for name in PARTS)
    llm, tower, merger = frozen
    if not lora:
        if vision_lora:
            raise RecipeError(f"{where}: vision_lora=True needs lora_enable=True.")
        keys = ("tuner.freeze_llm", "tuner.freeze_vit", "tuner.freeze_aligner")
        return {"tuner.train_type": "full"} | dict(zip(keys, frozen, strict=True))
    if not llm:
        raise RecipeError(f"{where}: lora_enable=True needs freeze_llm=True, as in that tool: the adapters train.")
    if vision_lora and not tower:
        raise RecipeError(f"{where}: vision_lora=True needs freeze_vision_tower=True, as in that tool.")
    if not tower:
        raise RecipeError(
            f"{where}: freeze_vision_tower=False trains the vision tower in full beside LoRA. Use freeze_vision_tower="
            "True with vision_lora=True for adapters in it, or lora_enable=False."
        )
    values: Values = {"tuner.train_type": "lora", "tuner.freeze_llm": False, "tuner.freeze_vit": not vision_lora}
    values["tuner.freeze_aligner"] = merger and not vision_lora
    return values | ({} if merger else {"tuner.modules_to_save": list(MERGERS)})


def _bits(entry: Entry) -> Values:
    bits = convert(entry.value, int, entry.where)
    return {} if bits == 16 else {"quantization.quantization_bit": bits}


def _excluded(entry: Entry) -> Values:
    try:
        names: Any = ast.literal_eval(entry.value) if isinstance(entry.value, str) else entry.value
    except (ValueError, SyntaxError):
        raise entry.refuse("is not a list of names. Example: \"['lm_head', 'embed_tokens']\".") from None
    never = {"lm_head", "embed_tokens", "visual", "visual.patch_embed"}
    for name in names:
        if name not in never:
            raise entry.refuse(
                f"excludes {name!r} from LoRA. Name what gets LoRA instead: --target_modules or --target_regex."
            )
    return {}


TWO_U_ONE = Tool(
    names={
        "model_id": "model.model",
        "data_path": "data.train",
        "eval_path": "data.val",
        "image_folder": "data.media_root",
        "max_seq_length": "template.max_length",
        "unfreeze_topk_llm": "tuner.unfreeze_topk_llm",
        "unfreeze_topk_vision": "tuner.unfreeze_topk_vit",
        "lora_rank": "tuner.lora_rank",
        "lora_alpha": "tuner.lora_alpha",
        "lora_dropout": "tuner.lora_dropout",
        "lora_bias": "tuner.lora_bias",
        "use_dora": "tuner.use_dora",
        "lora_weight_path": "tuner.resume_from_checkpoint",
        "vision_lr": "training.vit_lr",
        "merger_lr": "training.aligner_lr",
        "use_liger": "training.use_liger_kernel",
        "bits": _bits,
        "double_quant": "quantization.bnb_4bit_use_double_quant",
        "quant_type": "quantization.bnb_4bit_quant_type",
        "lora_namespan_exclude": _excluded,
        "image_min_pixels": "template.min_pixels",
        "image_max_pixels": "template.max_pixels",
        "video_max_pixels": "template.video_frame_max_pixels",
        "fps": "template.fps",
        "max_train_samples": "data.train_dataset_sample",
        "disable_flash_attn2": lambda entry: {"model.attn_impl": "sdpa"} if entry.yes else {},
    },
    only={
        "num_lora_modules": ((-1,), "the last modules by number have no setting. Use --target_regex."),
        "eval_image_folder": ((), "one folder holds all media. Use --image_folder."),
        "video_min_pixels": ((100352,), "frames have no lower limit. Leave it out."),
        "nframes": ((), "the number of frames follows from --fps. Use --fps_max_frames and --fps_min_frames."),
        **dict.fromkeys(
            ("image_resized_width", "image_resized_height", "video_resized_width", "video_resized_height"),
            ((), "media keep their shape. Use --image_max_pixels and --image_min_pixels."),
        ),
        "remove_unused_columns": ((False,), "a batch is not a table with columns. Leave it out."),
    },
    irrelevant=("cache_dir", "lazy_preprocess", "mlp_head_dim", "mlp_head_dropout"),
    joint=_parts,
    joint_keys=PARTS,
)
