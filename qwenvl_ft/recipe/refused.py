"""Fields of TrainingArguments with only one possible value; any other value is an error.

A setting that is accepted but has no effect can cost its user a run. So this table lists every field that is only read
by parts of transformers' Trainer that this package replaces (loaders, evaluation, loss), with its only value.
"""

from collections.abc import Iterator
from typing import Any

from qwenvl_ft.errors import hint
from qwenvl_ft.recipe.values import shown

FIXED: dict[str, tuple[Any, str]] = {
    "remove_unused_columns": (False, "a batch is not a table with columns"),
    "label_names": (["labels"], "the labels of a batch are always called labels"),
    "length_column_name": ("length", "lengths are measured, not read from the data"),
    "dataloader_drop_last": (False, "an epoch uses every record"),
    "dataloader_in_order": (True, "the order of the rows is planned"),
    "ignore_data_skip": (
        False,
        "a resumed run continues with unseen rows, and skipping the others costs nothing",
    ),
    "accelerator_config": (None, "the dataloaders are our own, and accelerate's settings do not reach them"),
    "logging_nan_inf_filter": (False, "it would hide a loss that is not finite, which must stop the run"),
    "average_tokens_across_devices": (True, "the loss is the mean over the supervised tokens of all ranks"),
    "ddp_find_unused_parameters": (False, "every trainable parameter takes part in every forward pass"),
    "use_cache": (False, "with a cache the samples of a row would attend to each other"),
    "disable_tqdm": (True, "progress is one line per step, in the console and in training.log"),
    "restore_callback_states_from_checkpoint": (False, "callbacks are restored from the trainer's state"),
    "enable_jit_checkpoint": (False, "a termination signal writes a checkpoint anyway"),
    "do_train": (True, "a recipe is always for training; use qwenvl-ft infer to ask a model"),
    "do_predict": (False, "there is no test set; use evaluation.data and evaluation.run_after_training"),
    "bf16_full_eval": (False, "evaluation uses the precision of training; see training.bf16"),
    "fp16_full_eval": (False, "evaluation uses the precision of training; see training.fp16"),
    "eval_accumulation_steps": (None, "evaluation sums the loss and keeps no predictions"),
    "eval_do_concat_batches": (True, "evaluation sums the loss and keeps no predictions"),
    "eval_use_gather_object": (False, "evaluation sums the loss and keeps no predictions"),
    "include_for_metrics": ([], "evaluation sums the loss and keeps no predictions"),
    "batch_eval_metrics": (False, "evaluation sums the loss and keeps no predictions"),
    "lazy_tokenize": (False, "lengths are planned before the first step, and samples are tokenized on demand anyway"),
}
"""Field under ``training`` -> its only value, and the reason. (``prediction_loss_only`` is not listed: evaluation
computes only the loss, and either value is accepted.)"""

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
    "parallelism_config": ("dp_replicate_size", "dp_shard_size"),
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
"""Mapping under ``training`` -> its keys that are used."""


def fixed_fields(values: dict[str, Any], origins: dict[str, str]) -> Iterator[str]:
    """Yield an error message for each field of ``training`` that does not have its only value."""
    for name, (only, why) in FIXED.items():
        if name in values and values[name] != only:
            key = f"training.{name}"
            where = f"{origins[key]}: " if key in origins else ""
            yield f"{where}{key}={shown(values[name])} cannot be honoured: {why}. Remove the key."


def unread_keys(values: dict[str, Any]) -> Iterator[str]:
    """Yield an error message for each key of a mapping under ``training`` that nothing reads."""
    for name, known in MAPPING_KEYS.items():
        mapping = values.get(name)
        for key in mapping if isinstance(mapping, dict) else ():
            if key not in known and key.removeprefix("fsdp_") not in known:
                yield f"training.{name}: unknown key {key!r}.{hint(key, known)}"
