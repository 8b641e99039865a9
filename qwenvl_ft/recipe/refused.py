"""Fields of TrainingArguments that training needs as they are, or never reads: what else is said of them is refused.

A setting that is taken and does nothing costs its user a run. So each field that transformers' Trainer reads in a place
that ours replaces (the loaders, the evaluation, the loss) stands here with its only value.
"""

from collections.abc import Iterator
from typing import Any

from qwenvl_ft.errors import hint
from qwenvl_ft.recipe.values import shown

FIXED: dict[str, tuple[Any, str]] = {
    "remove_unused_columns": (False, "a batch is no table with columns"),
    "label_names": (["labels"], "the labels of a batch are its labels"),
    "length_column_name": ("length", "lengths are measured, not read from the data"),
    "dataloader_drop_last": (False, "no record is left out of an epoch"),
    "dataloader_in_order": (True, "the order of the rows is planned"),
    "ignore_data_skip": (False, "a resumed run goes on with the rows that it has not seen; skipping costs nothing"),
    "accelerator_config": (None, "the loaders are our own, and accelerate's settings do not reach them"),
    "logging_nan_inf_filter": (False, "it would hide a loss that is not finite, which ends the run"),
    "average_tokens_across_devices": (True, "the loss is the mean over the tokens of all processes"),
    "ddp_find_unused_parameters": (False, "every trained parameter is in every pass"),
    "use_cache": (False, "with a cache the samples of a row would see each other"),
    "disable_tqdm": (True, "progress is a line a step, in the console and in training.log"),
    "restore_callback_states_from_checkpoint": (False, "what a callback keeps is restored from the trainer's state"),
    "enable_jit_checkpoint": (False, "a signal writes a checkpoint anyway"),
    "do_train": (True, "training is what a recipe is run for; qwenvl-ft infer asks a model"),
    "do_predict": (False, "there is no test set; evaluation.data and evaluation.run_after_training ask the model"),
    "bf16_full_eval": (False, "evaluation computes as training does; see training.bf16"),
    "fp16_full_eval": (False, "evaluation computes as training does; see training.fp16"),
    "eval_accumulation_steps": (None, "evaluation sums the loss and keeps no predictions"),
    "eval_do_concat_batches": (True, "evaluation sums the loss and keeps no predictions"),
    "eval_use_gather_object": (False, "evaluation sums the loss and keeps no predictions"),
    "include_for_metrics": ([], "evaluation sums the loss and keeps no predictions"),
    "batch_eval_metrics": (False, "evaluation sums the loss and keeps no predictions"),
    "lazy_tokenize": (False, "lengths are planned before the first step; samples are tokenized when needed anyway"),
}
"""Field under ``training`` -> its only value, and why. (``prediction_loss_only`` is how evaluation works; it may be
said.)"""

MAPPING_KEYS: dict[str, tuple[str, ...]] = {
    "liger_kernel_config": ("rms_norm", "swiglu", "rope", "fused_linear_cross_entropy"),
    "activation_checkpointing_kwargs": (
        "use_reentrant",
        "preserve_rng_state",
        "determinism_check",
        "early_stop",
        "every_n_layers",
        "offload",
    ),
    "fsdp_config": (
        "version",
        "reshard_after_forward",
        "auto_wrap_policy",
        "transformer_layer_cls_to_wrap",
        "min_num_params",
        "cpu_offload",
        "cpu_ram_efficient_loading",
        "state_dict_type",
        "activation_checkpointing",
        "forward_prefetch",
        "backward_prefetch",
        "use_orig_params",
        "sync_module_states",
        "limit_all_gathers",
    ),
}
"""Mapping under ``training`` -> the keys that are read from it."""


def fixed_fields(values: dict[str, Any], origins: dict[str, str]) -> Iterator[str]:
    """What is wrong with each field of ``training`` that is not as it has to be."""
    for name, (only, why) in FIXED.items():
        if name in values and values[name] != only:
            given = f"training.{name}"
            where = f"{origins[given]}: " if given in origins else ""
            yield f"{where}{given}={shown(values[name])} cannot be honoured: {why}. Remove the key."


def unread_keys(values: dict[str, Any]) -> Iterator[str]:
    """What is wrong with each mapping of ``training`` that has a key which nobody reads."""
    for name, known in MAPPING_KEYS.items():
        told = values[name] if name in values else None
        for key in told if isinstance(told, dict) else ():
            if key not in known and key.removeprefix("fsdp_") not in known:
                yield f"training.{name}: unknown key {key!r}.{hint(key, known)}"
