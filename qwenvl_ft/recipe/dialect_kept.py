"""The settings of which our default stays on a command line that was written for another tool, with the reasons."""

_SAME_RESULT = "the result is the same"
_TRANSFORMERS_KEPT = {
    "model.torch_dtype": "mixed precision over bfloat16, as these tools' examples ask for by bf16",
    "training.padding_free": f"{_SAME_RESULT}, and no padding is computed",
    "training.activation_checkpointing": f"{_SAME_RESULT}, in less memory",
    "training.dataloader_num_workers": f"{_SAME_RESULT}; auto uses the cores that there are",
    "training.dataloader_persistent_workers": f"{_SAME_RESULT}; workers of training start once",
    "training.report_to": "all would start every tracker that is installed",
    "training.optim": f"{_SAME_RESULT}; the fused kernel computes the same update faster",
}
KEPT: dict[str, dict[str, str]] = {
    "axolotl": _TRANSFORMERS_KEPT
    | {
        "data.dataset_num_proc": f"{_SAME_RESULT}; it only measures lengths",
    },
    "LLaMA-Factory": _TRANSFORMERS_KEPT
    | {
        "template.truncation_strategy": "LLaMA-Factory cuts samples, even within an image; ours drops and counts them",
        "data.dataset_num_proc": f"{_SAME_RESULT}; it only measures lengths",
    },
    "2U1": _TRANSFORMERS_KEPT | {"training.use_liger_kernel": "that tool refuses its default for Qwen3-VL"},
    "ms-swift": {
        "training.padding_free": f"{_SAME_RESULT}, and no padding is computed",
        "training.dataloader_num_workers": f"{_SAME_RESULT}; auto uses the cores that there are",
        "data.dataset_num_proc": f"{_SAME_RESULT}; it only measures lengths",
        "training.output_dir": "a run does not name its folder by model and date",
        "model.attn_impl": f"{_SAME_RESULT}; auto takes the fastest kernel that runs",
        "model.model_revision": f"{_SAME_RESULT}: a hub's default branch is main",
        "template.template": f"{_SAME_RESULT}: the text comes from the processor's own chat template",
        "training.galore_target_modules": "ours are the linear layers of the language model, by name",
        "training.swanlab_project": "it only names the project in a tracker",
        "training.swanlab_mode": "the tracker's own default",
        "training.ddp_timeout": "a rank that hangs ends the run after transformers' 30 minutes, not after 208 days",
        "training.lazy_tokenize": f"{_SAME_RESULT}; samples are tokenized on demand anyway",
        "training.remove_unused_columns": "a batch is not a table with columns",
        "training.bf16": f"{_SAME_RESULT}: it follows the precision of the model",
        "training.fp16": f"{_SAME_RESULT}: it follows the precision of the model",
        "training.data_seed": "the order of the data follows training.seed, which is 42 too",
        "training.metric_for_best_model": f"{_SAME_RESULT}: loss is the metric where one is needed",
    },
    "train_qwen.py": _TRANSFORMERS_KEPT
    | {
        "tuner.train_type": "without a flag that names parts, the script trains nothing and stops; LoRA trains",
        "tuner.lora_dropout": "the script reads 0 as 0.05, which is our default",
    },
}
"""Tool -> our key -> why our default stays although the tool's is another."""
