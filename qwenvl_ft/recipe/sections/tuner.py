"""The section ``tuner``: which weights train, by which method, and from which start."""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from qwenvl_ft.recipe.choices import OneOf
from qwenvl_ft.recipe.limits import (
    Fraction,
    NonNegative,
    NonNegativeFloat,
    OpenFraction,
    Positive,
    PositiveFloat,
    Share,
)


@dataclass(kw_only=True)
class MethodAndParts:
    """Method, and the parts that train."""

    train_type: Annotated[str, OneOf("qwenvl_ft.recipe.methods:METHODS")] = "lora"
    """Training method: all weights of the unfrozen parts (full), low-rank updates (lora), small networks after the MLPs
    (adapter), edits of hidden states (reft), new blocks in the language model (llamapro), lora with shifted group
    attention for long samples (longlora), or another method of peft; see docs/tuning.md."""
    freeze_llm: bool = False
    """Freeze the language model."""
    freeze_vit: bool | None = None
    """Freeze the vision tower; null is false for train_type full, which trains all parts, and true for all others and
    with unfreeze_topk_vit."""
    freeze_aligner: bool | None = None
    """Freeze the merger and all deepstack mergers; null is false for train_type full, and true for all others."""
    resume_from_checkpoint: str | None = None
    """Folder of an adapter to continue training, for a second stage; new target modules may be added. The run
    starts at step 0."""


@dataclass(kw_only=True)
class Targets:
    """Modules that get an adapter."""

    target_modules: list[str] = field(default_factory=lambda: ["all-linear"])
    """Modules that get an adapter: all-linear (every Linear layer of the unfrozen parts but the language
    head and, for most methods, gates) or endings of module names."""
    target_regex: str | None = None
    """Regex for the full names of modules that get an adapter, instead of target_modules; '^$' selects none."""
    target_parameters: list[str] | None = None
    """Weights outside Linear layers that get LoRA too, by endings of their names: experts.gate_up_proj,
    experts.down_proj, mlp.gate.weight (the router). null selects all experts if target_modules is all-linear; []
    selects none."""
    modules_to_save: list[str] = field(default_factory=list)
    """Modules that are trained in full and saved with the adapter, for example model.visual.merger."""


@dataclass(kw_only=True)
class Lora:
    """LoRA."""

    lora_rank: Positive = 8
    """Rank of the update."""
    lora_alpha: Positive = 32
    """Scale of the update: it is multiplied by alpha / rank."""
    lora_dropout: Fraction = 0.05
    """Dropout probability of the adapter's input."""
    lora_bias: Literal["none", "all", "lora_only"] = "none"
    """Biases that are trained."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(rank) instead (rsLoRA)."""
    use_dora: bool = False
    """Train magnitude and direction of each weight separately (DoRA)."""
    lora_dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """Precision of the adapter's weights; null uses that of other trainable weights."""
    rank_pattern: dict[str, Positive] = field(default_factory=dict)
    """lora_rank of individual targets: ending or regex of the module name -> rank."""
    alpha_pattern: dict[str, PositiveFloat] = field(default_factory=dict)
    """lora_alpha of individual targets: ending or regex of the module name -> alpha."""


@dataclass(kw_only=True)
class LoraStart:
    """Initialisation of LoRA."""

    init_weights: bool | str = True
    """Initialisation: true (as published), gaussian, pissa, pissa_niter_N (fast), olora, loftq (for a 4-bit model),
    lora-ga (from gradients), eva (from activations)."""
    lora_ga_batch_size: Positive = 2
    """Samples per batch in the gradient pass of lora-ga."""
    lora_ga_iters: Positive = 2
    """Number of batches in that pass."""
    lora_ga_max_length: Positive = 1024
    """Maximum length of its samples, in tokens."""
    lora_ga_direction: Literal["ArBr", "A2rBr", "ArB2r", "random"] = "ArB2r"
    """Choice of the gradient's singular vectors that become A and B."""
    lora_ga_scale: Literal["gd", "unit", "stable", "weightS"] = "stable"
    """Scale of the initial A and B, by peft: stable scales B alone (with lora_ga_stable_gamma) where the paper scales
    both, and weightS scales B alone to the weight's largest singular value; gd divides both by LoRA's own scale; unit
    scales neither."""
    lora_ga_stable_gamma: Positive = 16
    """Gamma of the stable scale."""
    eva_batch_size: Positive = 4
    """Samples per batch in the activation pass of eva."""
    eva_iters: Positive = 16
    """Number of batches, repeated until the directions converge."""
    eva_rho: PositiveFloat = 2.0
    """Largest rank of a layer as a multiple of lora_rank. Ranks are distributed by explained variance; 1 keeps them
    equal."""

    def __post_init__(self) -> None:
        if isinstance(self.init_weights, str):
            self.init_weights = self.init_weights.lower()  # OLoRA, as the papers write it

    @property
    def changes_base(self) -> bool:
        """True if the initialisation subtracts LoRA's start from the base weights."""
        return str(self.init_weights).startswith(("pissa", "olora", "lora-ga"))


@dataclass(kw_only=True)
class AdaLora:
    """AdaLoRA."""

    adalora_target_r: Positive = 8
    """Final mean rank per layer."""
    adalora_init_r: Positive = 12
    """Initial rank of each layer."""
    adalora_tinit: NonNegative = 0
    """Number of steps before ranks are pruned."""
    adalora_tfinal: NonNegative = 0
    """Number of steps at the end with fixed ranks."""
    adalora_deltaT: Positive = 1
    """Number of steps between two prunings."""
    adalora_beta1: OpenFraction = 0.85
    """Smoothing factor (EMA) of a weight's sensitivity."""
    adalora_beta2: OpenFraction = 0.85
    """Smoothing factor (EMA) of its uncertainty."""
    adalora_orth_reg_weight: NonNegativeFloat = 0.5
    """Weight of the orthogonality term in the loss."""


@dataclass(kw_only=True)
class PeftMethods:
    """Other methods of peft."""

    vera_rank: Positive = 256
    """Rank of the frozen matrices that all layers share."""
    vera_dropout: Fraction = 0.0
    """Dropout probability of their input."""
    vera_d_initial: float = 0.1
    """Initial value of the trained vector d between them."""
    boft_block_size: NonNegative = 4
    """Size of a rotated block; must divide the input width of every target."""
    boft_block_num: NonNegative = 0
    """Number of blocks, instead of boft_block_size."""
    boft_n_butterfly_factor: Positive = 1
    """Number of butterfly factors; each doubles the reach of a rotation."""
    boft_dropout: Fraction = 0.0
    """Share of blocks that are left unrotated in a step."""
    fourier_n_frequency: Positive = 2000
    """Number of trained frequencies per target."""
    fourier_scaling: PositiveFloat = 300.0
    """Scale of the update."""
    bone_rank: Positive = 64
    """Block width of train_type bone."""
    bone_init: Literal["default", "bat"] = "default"
    """default adds the blocks to the weight; bat also makes them depend on it."""
    peft_options: dict[str, Any] = field(default_factory=dict)
    """Fields of peft's config, for train types without keys of their own: {r: 8, alpha: 16}."""


@dataclass(kw_only=True)
class FullTraining:
    """Full training: weights frozen or trained by name."""

    freeze_parameters: list[str] = field(default_factory=list)
    """Freeze parameters whose names start with one of these, for example model.layers.0; language_model may be left
    out."""
    freeze_parameters_regex: str | None = None
    """Freeze parameters in whose names this regex is found: model.layers.[0-5].* freezes six layers."""
    freeze_parameters_ratio: Share = 0.0
    """Share of all weights to freeze, counted from the input side (vision tower first)."""
    trainable_parameters: list[str] = field(default_factory=list)
    """Train parameters whose names start with one of these, for example lm_head, even if another key freezes them."""
    trainable_parameters_regex: str | None = None
    """Train parameters in whose names this regex is found, even if another key freezes them."""
    unfreeze_topk_llm: NonNegative = 0
    """Train this number of the last language-model layers although freeze_llm is true."""
    unfreeze_topk_vit: NonNegative = 0
    """Train this number of the last vision blocks although freeze_vit is true."""


@dataclass(kw_only=True)
class OwnMethods:
    """Methods that peft does not have."""

    adapter_length: Positive = 128
    """Hidden width of the network that train_type adapter puts after an MLP."""
    adapter_act: str = "gelu"
    """Its activation function, by its name in transformers."""
    reft_layers: list[NonNegative] | None = None
    """Language-model layers whose output is edited; null edits all."""
    reft_rank: Positive = 4
    """Rank of an edit."""
    reft_intervention_type: Literal["LoreftIntervention", "NoreftIntervention", "ConsreftIntervention"] = (
        "LoreftIntervention"
    )
    """Form of the edit: in an orthonormal subspace, in any subspace, or to a constant."""
    reft_positions: str = "f1+l1"
    """Edited tokens: fP, the first P of each sample; lS, the last S of each prompt; fP+lS; or all."""
    llamapro_num_new_blocks: Positive = 4
    """Number of new blocks, spread evenly over the language model; each starts as the identity."""
    longlora_group_size: Positive = 2048
    """Number of tokens that attend to one another during training; for half of the heads the groups shift by half of
    it. The paper uses a quarter of the context."""
    longlora_embeddings_and_norms: bool = True
    """Also train the embeddings and normalisation layers of the language model, as the paper does."""


@dataclass(kw_only=True)
class TunerConfig(MethodAndParts, Targets, Lora, LoraStart, AdaLora, PeftMethods, FullTraining, OwnMethods):
    """Weights that are trained, and the method."""

    def __post_init__(self) -> None:
        super().__post_init__()
        adapter = self.train_type != "full"
        if self.freeze_vit is None:
            self.freeze_vit = adapter or self.unfreeze_topk_vit > 0
        if self.freeze_aligner is None:
            self.freeze_aligner = adapter
