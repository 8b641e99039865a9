"""Our defaults, limits and types for fields of transformers' TrainingArguments, which stand under ``training``."""

from typing import Any, Literal

from qwenvl_ft.recipe.limits import NonNegative, Positive

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
"""Defaults that differ from those of TrainingArguments, or that a saved recipe should show."""

MIN_LR_SCHEDULES = ("cosine_with_min_lr", "cosine_warmup_with_min_lr")
"""Values of ``training.lr_scheduler_type`` that take a minimum learning rate (``min_lr``)."""

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
"""Field of TrainingArguments -> limit of its values, a key of `values.LIMITS`; its own annotations have none."""

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
    "parallelism_config": dict[str, Positive] | None,
    "include_num_input_tokens_seen": Literal["no", "all", "non_padding"] | bool,
    "ddp_backend": Literal["nccl", "gloo", "mpi", "xccl", "ccl", "hccl", "cncl", "mccl"] | None,
}
"""Field of TrainingArguments -> type, for fields whose own annotation is too wide, such as plain ``str``."""
