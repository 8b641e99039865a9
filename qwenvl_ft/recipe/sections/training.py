"""The section ``training``: rows, learning rates, optimizers, memory, logs and checkpoints of a run.

All fields of transformers' TrainingArguments may stand in it too; they are kept in ``TrainingConfig.arguments``.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from qwenvl_ft.recipe.limits import NonNegative, NonNegativeFloat, Positive, PositiveFloat

GALORE = {
    "adamw_torch": "galore_adamw",
    "adamw_torch_fused": "galore_adamw",
    "adamw_8bit": "galore_adamw_8bit",
    "adamw_bnb_8bit": "galore_adamw_8bit",
    "adafactor": "galore_adafactor",
}
"""``training.optim`` -> its GaLore variant."""


@dataclass(kw_only=True)
class Packing:
    """Packing samples into rows."""

    packing: bool = True
    """Fill each row of template.max_length tokens with whole samples that cannot attend to one another."""
    padding_free: bool = True
    """Join the samples of a batch into one row instead of padding them; set false only for comparison."""
    pack_dataset_break_mode: Literal["no_break_longest_only", "break"] = "no_break_longest_only"
    """Rule for filling rows: longest sample first, each into the fullest row with room for it. Samples are never split,
    so break is an error."""
    lazy_tokenize: bool = False
    """true is an error: lengths are planned before the first step, and samples are tokenized on demand anyway."""


@dataclass(kw_only=True)
class Parallelism:
    """One row on several processes."""

    sequence_parallel_size: Positive = 1
    """Number of processes that share each row: each keeps its part of the tokens and runs its share of the images and
    frames. It divides the number of processes and of attention heads; batch sizes count rows of such a group."""


@dataclass(kw_only=True)
class Optimization:
    """Optimizer, learning rates and loss."""

    optimizer: Literal["multimodal", "lorap", "galore"] = "multimodal"
    """Parameter groups per part, each with its own learning rate; the algorithm is optim. lorap adds lorap_lr_ratio (16
    if not set), galore adds use_galore."""
    learning_rate: NonNegativeFloat | None = None
    """Learning rate of the language model, and of the parts below if theirs is not set; null is 1e-4 for adapters, 1e-5
    for full."""
    vit_lr: NonNegativeFloat | None = None
    """Learning rate of the vision tower."""
    aligner_lr: NonNegativeFloat | None = None
    """Learning rate of the merger and the deepstack mergers."""
    lorap_lr_ratio: PositiveFloat | None = None
    """LoRA+: learning rate of LoRA's B matrices as a multiple of their part's rate, for example 16."""
    z_loss: NonNegativeFloat = 0.0
    """Weight of the squared log-partition function (log Z) of each softmax in the training loss, for example 1e-4; 0
    turns it off."""


@dataclass(kw_only=True)
class Galore:
    """GaLore: low-rank gradients."""

    use_galore: bool = False
    """The optimizer keeps the gradients of Linear layers in low rank. Full training only, not with
    DeepSpeed or FSDP."""
    galore_target_modules: list[str] = field(default_factory=lambda: ["mlp", "self_attn"])
    """Linear layers whose gradients are projected: those with one of these strings in their names."""
    galore_rank: Positive = 128
    """Rank of the projection."""
    galore_update_proj_gap: Positive = 50
    """Number of steps between two updates of the projection."""
    galore_scale: PositiveFloat = 1.0
    """Factor applied to the projected update."""
    galore_proj_type: Literal["std", "reverse_std", "right", "left", "full"] = "std"
    """Side that is projected; std takes the shorter one."""


@dataclass(kw_only=True)
class Lisa:
    """LISA: a few random layers at a time."""

    lisa_activated_layers: NonNegative = 0
    """Number of language-model layers that train at a time, redrawn at random, for example 2; 0 trains all. Full
    training only, not with DeepSpeed or FSDP."""
    lisa_step_interval: Positive = 20
    """Number of steps between two draws."""


@dataclass(kw_only=True)
class Recomputation:
    """Gradient checkpointing by part."""

    llm_gradient_checkpointing: bool | None = None
    """Recompute the language model's layers in the backward pass instead of keeping their activations; null follows
    activation_checkpointing."""
    vit_gradient_checkpointing: bool | None = None
    """The same for the layers of the vision tower."""


@dataclass(kw_only=True)
class Monitoring:
    """Logs, trackers and early stopping."""

    logging_dir: str | None = None
    """Folder of the TensorBoard files; null creates a new one in output_dir."""
    wandb_project: str | None = None
    """Weights & Biases project; null takes WANDB_PROJECT from the environment, or huggingface."""
    wandb_entity: str | None = None
    """Weights & Biases account or team."""
    swanlab_project: str | None = None
    """SwanLab project."""
    swanlab_mode: Literal["cloud", "local", "offline", "disabled"] | None = None
    """Mode of SwanLab: where a run is stored."""
    swanlab_token: str | None = None
    """SwanLab API key, as ${oc.env:NAME}; never printed or saved."""
    zero_gradient_steps: NonNegative = 20
    """Warn after this number of consecutive steps in which a trainable part gets no gradient; 0 never warns."""
    early_stopping_patience: Positive | None = None
    """Stop after this number of evaluations without a better metric_for_best_model; null never stops early."""


@dataclass(kw_only=True)
class Checkpoints:
    """Checkpoints."""

    resume_from_checkpoint: str | bool | None = None
    """true or auto resumes from the last complete checkpoint in output_dir; otherwise the folder of a checkpoint."""
    resume_weights_only: bool = False
    """Start a new run from the weights of the folder in resume_from_checkpoint, also one of another tool or without
    optimizer: steps, schedule and plan begin anew, and output_dir must be another folder."""
    save_final: bool = True
    """Write the trained model to output_dir at the end, in addition to the checkpoints of save_strategy."""


@dataclass(kw_only=True)
class TrainingConfig(Packing, Parallelism, Optimization, Galore, Lisa, Recomputation, Monitoring, Checkpoints):
    """Settings of the run. Every field of transformers' TrainingArguments may stand here too."""

    arguments: dict[str, Any] = field(default_factory=dict)
    """Fields of TrainingArguments; in the file they stand directly under training."""
