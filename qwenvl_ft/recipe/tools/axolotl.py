"""Which of our keys are axolotl's (0.19), and which files do its ``datasets`` name?"""

from typing import Any

from qwenvl_ft.errors import RecipeError
from qwenvl_ft.recipe.foreign import Entry, Tool, Values, is_null
from qwenvl_ft.recipe.values import convert

SAME_DATA: dict[str, tuple[Any, ...]] = {
    "type": ("chat_template",),
    "split": ("train",),
    "field_messages": ("messages", "conversations"),
    "roles_to_train": (["assistant"],),
    "train_on_eos": ("turn",),
    "ds_type": ("json", "parquet", "csv"),
    "chat_template": ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "tokenizer_default"),
    "message_property_mappings": (
        {"role": "role", "content": "content"},
        {"role": "from", "content": "value"},
    ),
}
"""Key of a data set -> values that describe what the readers do."""


def _data(theirs: Values, where: str) -> Values:
    """Return the data sets by the files that they name."""
    values: Values = {}
    for theirs_key, our_key in (("datasets", "data.train"), ("test_datasets", "data.val")):
        entries = theirs.get(theirs_key)
        if is_null(entries):
            continue
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise RecipeError(f"{where}: {theirs_key} is not a list of mappings. Example: [{{path: my.jsonl}}].")
        values[our_key] = [file for entry in entries for file in _files(entry, f"{where}: {theirs_key}")]
    return values


def _files(entry: Values, where: str) -> list[str]:
    for key, value in entry.items():
        if key in ("path", "data_files") or is_null(value):
            continue
        if key not in SAME_DATA or value not in SAME_DATA[key]:
            raise RecipeError(f"{where}: {key}: {value!r} is not read. Leave it out, or convert the records.")
    files = entry.get("data_files")
    chosen = entry.get("path") if is_null(files) else files
    if is_null(chosen):
        raise RecipeError(f"{where}: an entry has no path. Example: path: my.jsonl.")
    return [str(file) for file in chosen] if isinstance(chosen, list) else [str(chosen)]


def _adapter(entry: Entry) -> Values:
    if entry.value not in ("lora", "qlora"):
        raise entry.refuse("is not mapped. Use lora or qlora, or tuner.train_type in a recipe.")
    bits = {"quantization.quantization_bit": 4} if entry.value == "qlora" else {}
    return {"tuner.train_type": "lora"} | bits


def _targets(entry: Entry) -> Values:
    if isinstance(entry.value, str):
        return {"tuner.target_regex": entry.value}
    return {"tuner.target_modules": list(entry.value)}


def _bits(bits: int) -> Any:
    return lambda entry: {"quantization.quantization_bit": bits} if entry.yes else {}


def _attention(implementation: str) -> Any:
    return lambda entry: {"model.attn_impl": implementation} if entry.yes else {}


def _precision(name: str) -> Any:
    return lambda entry: {} if entry.value in ("auto", "full") else {f"training.{name}": entry.yes}


def _per_epoch(kind: str) -> Any:
    """Return the meaning of a number of evaluations or checkpoints per epoch: a share of all steps."""

    def meaning(entry: Entry) -> Values:
        if kind == "eval" and not any(entry.around.get(key) for key in ("val_set_size", "test_datasets")):
            return {}
        epochs = entry.other("num_epochs", 1.0)
        count = convert(entry.value, int, entry.where) * epochs
        if count <= 0:
            return {f"training.{kind}_strategy": "no"}
        if count <= 1:
            return {f"training.{kind}_strategy": "epoch"}
        return {f"training.{kind}_strategy": "steps", f"training.{kind}_steps": 1 / count}

    return meaning


def _hub(entry: Entry) -> Values:
    """Return what axolotl sets beside a name on the Hub."""
    switches = ("push_to_hub", "hub_private_repo", "hub_always_push")
    return {"training.hub_model_id": entry.value} | {f"training.{name}": True for name in switches}


def _longer(entry: Entry) -> Values:
    known = {"drop": "delete", "truncate": "right", "raise": "raise"}
    if entry.value not in known:
        raise entry.refuse(f"is not one of {', '.join(known)}.")
    return {"template.truncation_strategy": known[entry.value]}


def _recompute(entry: Entry) -> Values:
    if entry.value in ("offload", "offload_disk"):
        raise entry.refuse("is not mapped. Use true.")
    return {"training.activation_checkpointing": entry.yes}


def _frozen_media(entry: Entry) -> Values:
    return {"tuner.freeze_vit": entry.yes, "tuner.freeze_aligner": entry.yes}


def _template(entry: Entry) -> Values:
    if entry.value != "tokenizer_default" and not str(entry.value).startswith("qwen"):
        raise entry.refuse("is not a template of a Qwen-VL model. The processor's own chat template is used.")
    return {}


_NOT_HERE = "this package does not have it. Leave it out."
_OTHER_TRAINING = "this package only trains on answers. Leave it out."
_OWN_ROWS = "rows are planned from sample lengths. Leave it out."
_ONE_DEVICE = "it is not mapped. Use deepspeed: zero3, or for long rows training.sequence_parallel_size in a recipe."
_ABSENT = {
    _OTHER_TRAINING: (
        "rl trl vllm ebft reward_model process_reward_model center_rewards_coefficient num_labels pretraining_dataset "
        "streaming train_on_inputs use_pose curriculum_sampling use_eaft role_boundaries"
    ),
    _OWN_ROWS: (
        "sample_packing_sequentially eval_sample_packing batch_flattening pretrain_multipack_attn eval_sequence_len "
        "max_packed_sequence_len min_sample_len max_prompt_len accelerator_config dataloader_drop_last"
    ),
    _ONE_DEVICE: (
        "dp_shard_size dp_replicate_size sequence_parallel_degree context_parallel_size tensor_parallel_size "
        "heads_k_stride ring_attn_func tiled_mlp"
    ),
    _NOT_HERE: (
        "peft_layers_to_transform peft_layers_pattern peft peft_layer_replication peft_trainable_token_indices "
        "peft_ensure_weight_tying lora_fan_in_fan_out gptq bnb_config_kwargs relora jagged_restart_steps embedding_lr "
        "embedding_lr_scale lr_quadratic_warmup cosine_min_lr_ratio cosine_constant_lr_ratio lr_div_factor lr_groups "
        "torchdistx_path adam_epsilon2 adam_beta3 lisa_n_layers image_size image_resize_algorithm s2_attention "
        "overrides_of_model_config overrides_of_model_kwargs model_quantization_config resize_token_embeddings_to_32x "
        "mean_resizing_embeddings shrink_embeddings reinit_weights trainer_cls qat quantization dynamic_checkpoint "
        "dataset_shard_num dataset_shard_idx dataset_exact_deduplication push_dataset_to_hub world_size local_rank "
        "do_causal_lm_eval eval_causal_lm_metrics do_bench_eval bench_dataset loss_watchdog_threshold fp8 "
        "selective_checkpointing activation_offloading layer_offloading unfrozen_parameters flex_attention "
        "sage_attention xformers_attention use_onebitllms scaling_softmax deepcompile special_tokens tokens "
        "added_tokens_overrides orpo_alpha chat_template_jinja eot_tokens fix_untrained_tokens plugins "
        "use_otel_metrics noisy_embedding_alpha merge_lora ple_cpu_offload quantize_moe_experts flash_optimum "
        "generate_samples batch_size auto_resume_from_checkpoints chat_template_kwargs float16 float32 "
        "pad_to_multiple_of save_first_step ddp "
        "gpu_memory_limit shuffle_before_merging_datasets wandb_run_id wandb_log_model wandb_watch use_ray"
    ),
}
"""Reason -> switches and settings that are refused for it, unless they are off."""

_IRRELEVANT = (
    "base_model_config cls_model_config tokenizer_config tokenizer_use_fast tokenizer_legacy "
    "tokenizer_use_mistral_common tokenizer_type processor_type processor_kwargs "
    "tokenizer_save_jinja_files trust_remote_code use_kernels "
    "experimental_skip_move_to_device model_quantization_config_kwargs type_of_model save_safetensors lora_on_cpu "
    "qlora_sharded_model_loading peft_autocast_adapter_dtype merge_method relora_* jagged_* dion_* qgalore_* mlflow_* "
    "hf_mlflow_log_artifacts use_mlflow use_comet comet_* use_trackio trackio_* otel_* lisa_* gradio_* ray_* "
    "resources_per_worker dpo_* eval_table_size eval_max_new_tokens rpo_alpha flash_attn_* strict "
    "embeddings_skip_upcast precompute_ref_log_probs shuffle_merged_datasets dataset_prepared_path "
    "skip_prepare_dataset num_dataset_shards_to_save dataset_keep_in_memory remove_unused_columns hf_use_auth_token "
    "device ddp_* bench_split loss_watchdog_patience gc_* torch_empty_cache_steps fp8_* bfloat16 "
    "sample_packing_group_size sample_packing_bin_size sample_packing_mp_start_method pad_to_sequence_len "
    "multipack_real_batches pose_* pretrain_* pretraining_* streaming_* flex_attn_* gemma4_* large_head_attention "
    "sdpa_varlen fused_attn_kernel experts_implementation scaling_softmax_* lora_mlp_kernel lora_qkv_kernel "
    "lora_o_kernel lora_embedding_kernel chunked_cross_entropy chunked_cross_entropy_num_chunks eaft_* tiled_mlp_* "
    "llama4_* fsdp_version fsdp_final_state_dict_type fp32_* torch_compile_options profiler_* include_* simpo_gamma "
    "cpo_alpha kto_* rl_beta low_cpu_mem_usage is_* preprocess_iterable total_* sample_packing_eff_est "
    "axolotl_config_path num_generation_samples generation_* use_tensorboard use_wandb wandb_mode "
    "loraplus_lr_embedding wandb_name"
)
"""Keys that change no result: kernels, caches, trackers, other stages."""

AXOLOTL = Tool(
    names={
        "base_model": "model.model",
        "revision_of_model": "model.model_revision",
        "rope_scaling": "model.rope_scaling",
        "device_map": "model.device_map",
        "max_memory": "model.max_memory",
        "adapter": _adapter,
        "load_in_4bit": _bits(4),
        "load_in_8bit": _bits(8),
        "lora_model_dir": "tuner.resume_from_checkpoint",
        "lora_r": "tuner.lora_rank",
        "lora_alpha": "tuner.lora_alpha",
        "lora_dropout": "tuner.lora_dropout",
        "lora_target_modules": _targets,
        "lora_target_linear": lambda entry: {"tuner.target_modules": ["all-linear"]} if entry.yes else {},
        "lora_target_parameters": "tuner.target_parameters",
        "lora_modules_to_save": "tuner.modules_to_save",
        "lora_rank_pattern": "tuner.rank_pattern",
        "lora_alpha_pattern": "tuner.alpha_pattern",
        "peft_use_dora": "tuner.use_dora",
        "peft_use_rslora": "tuner.use_rslora",
        "peft_init_lora_weights": "tuner.init_weights",
        "loraplus_lr_ratio": "training.lorap_lr_ratio",
        "freeze_mm_modules": _frozen_media,
        "hub_model_id": _hub,
        "micro_batch_size": "training.per_device_train_batch_size",
        "eval_batch_size": "training.per_device_eval_batch_size",
        "num_epochs": "training.num_train_epochs",
        "optimizer": "training.optim",
        "lr_scheduler": "training.lr_scheduler_type",
        "evals_per_epoch": _per_epoch("eval"),
        "saves_per_epoch": _per_epoch("save"),
        "bf16": _precision("bf16"),
        "fp16": _precision("fp16"),
        "gradient_checkpointing": _recompute,
        "sequence_len": "template.max_length",
        "excess_length_strategy": _longer,
        "sample_packing": "training.packing",
        "val_set_size": "data.split_dataset_ratio",
        "dataset_processes": "data.dataset_num_proc",
        "dataset_num_proc": "data.dataset_num_proc",
        "default_system_message": "template.system_prompt",
        "chat_template": _template,
        "flash_attention": _attention("flash_attn"),
        "sdp_attention": _attention("sdpa"),
        "eager_attention": _attention("eager"),
        "attn_implementation": "model.attn_impl",
        "wandb_project": "training.wandb_project",
        "wandb_entity": "training.wandb_entity",
        "early_stopping_patience": "training.early_stopping_patience",
    },
    only={key: ((False, 0), why) for why, keys in _ABSENT.items() for key in keys.split()},
    irrelevant=tuple(_IRRELEVANT.split()),
    joint=_data,
    joint_keys=("datasets", "test_datasets"),
)
