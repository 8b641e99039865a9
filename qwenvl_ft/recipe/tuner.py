"""The ``tuner`` section: which weights train, by which method, from where."""

from dataclasses import dataclass, field
from typing import Any, Literal

from qwenvl_ft.recipe.limits import (
    Fraction,
    NonNegative,
    NonNegativeFloat,
    OpenFraction,
    Positive,
    PositiveFloat,
    Share,
)

PeftsOwn = Literal[
    "c3a",
    "deft",
    "delora",
    "gralora",
    "hira",
    "hra",
    "ia3",
    "loha",
    "lokr",
    "miss",
    "oft",
    "psoft",
    "randlora",
    "road",
    "shira",
    "tinylora",
    "vblora",
    "waveft",
]
"""Methods of peft without keys of their own."""
TrainType = Literal[
    "full",
    "lora",
    "longlora",
    "adalora",
    "llamapro",
    "adapter",
    "vera",
    "boft",
    "fourierft",
    "reft",
    "bone",
    PeftsOwn,
]


@dataclass(kw_only=True)
class TunerConfig:
    """Which weights are trained, and how."""

    train_type: TrainType = "lora"
    """How weights are trained: all of the parts that are not frozen (full), low-rank updates (lora), small networks
    after their MLPs (adapter), edits of hidden states (reft), new blocks in the language model (llamapro), lora with
    attention in shifted groups for long samples (longlora), or another of peft's methods, see docs/tuning.md."""
    freeze_llm: bool = False
    """Leave the language model as it is."""
    freeze_vit: bool = True
    """Leave the vision tower as it is."""
    freeze_aligner: bool = True
    """Leave the merger and all deepstack mergers as they are."""
    target_modules: list[str] = field(default_factory=lambda: ["all-linear"])
    """Modules that get an adapter: all-linear (of the parts that are not frozen) or endings of names."""
    target_regex: str | None = None
    """Full names that get an adapter, instead of target_modules; '^$' is none."""
    target_parameters: list[str] | None = None
    """Weights outside of Linear layers that get LoRA too, by endings of names: experts.gate_up_proj, experts.down_proj,
    mlp.gate.weight (the router). null is all experts if target_modules is all-linear; [] is none."""
    modules_to_save: list[str] = field(default_factory=list)
    """Modules trained in full and saved beside the adapter, as model.visual.merger."""
    resume_from_checkpoint: str | None = None
    """Folder of an adapter that goes on training, beside new layers if there are any: a second stage. The run itself
    begins anew."""
    lora_rank: Positive = 8
    """Rank of the update."""
    lora_alpha: Positive = 32
    """The update is scaled by alpha / rank."""
    lora_dropout: Fraction = 0.05
    """Dropout before the adapter."""
    lora_bias: Literal["none", "all", "lora_only"] = "none"
    """Which biases are trained."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(rank)."""
    use_dora: bool = False
    """Train magnitude and direction apart (DoRA)."""
    lora_dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """Precision that an adapter's weights are held in; null is that of other trained weights."""
    rank_pattern: dict[str, Positive] = field(default_factory=dict)
    """Ending or regex of a target's name -> its own lora_rank."""
    alpha_pattern: dict[str, PositiveFloat] = field(default_factory=dict)
    """Ending or regex of a target's name -> its own lora_alpha."""
    init_weights: bool | str = True
    """How LoRA starts: true (as published), gaussian, pissa, pissa_niter_N (fast), olora, loftq (on a 4-bit model),
    lora-ga (from gradients), eva (from activations)."""
    lora_ga_batch_size: Positive = 2
    """Samples in a batch of lora-ga's gradient pass."""
    lora_ga_iters: Positive = 2
    """Batches of that pass."""
    lora_ga_max_length: Positive = 1024
    """Tokens of the longest sample in it."""
    lora_ga_direction: Literal["ArBr", "A2rBr", "ArB2r", "random"] = "ArB2r"
    """Which singular vectors of the gradient become A and B."""
    lora_ga_scale: Literal["gd", "unit", "stable", "weightS"] = "stable"
    """Size of the start."""
    lora_ga_stable_gamma: Positive = 16
    """Gamma of the stable scale."""
    eva_batch_size: Positive = 4
    """Samples in a batch of eva's pass."""
    eva_iters: Positive = 16
    """Batches that are gone through until the directions settle."""
    eva_rho: PositiveFloat = 2.0
    """Largest rank of a layer in lora_rank; ranks are handed out by explained variance. 1 keeps them equal."""
    adalora_target_r: Positive = 8
    """Mean rank of a layer in the end."""
    adalora_init_r: Positive = 12
    """Rank of each layer at the start."""
    adalora_tinit: NonNegative = 0
    """Steps before ranks are cut."""
    adalora_tfinal: NonNegative = 0
    """Steps at the end in which ranks stay as they are."""
    adalora_deltaT: Positive = 1
    """Steps between two cuts."""
    adalora_beta1: OpenFraction = 0.85
    """Smoothing of a weight's sensitivity."""
    adalora_beta2: OpenFraction = 0.85
    """Smoothing of its uncertainty."""
    adalora_orth_reg_weight: NonNegativeFloat = 0.5
    """Weight of the orthogonality term in the loss."""
    vera_rank: Positive = 256
    """Rank of the frozen matrices that all layers share."""
    vera_dropout: Fraction = 0.0
    """Dropout before them."""
    vera_d_initial: float = 0.1
    """Start of the trained vector between them."""
    boft_block_size: NonNegative = 4
    """Size of a rotated block; it has to divide the width of each target."""
    boft_block_num: NonNegative = 0
    """Number of blocks, instead of boft_block_size."""
    boft_n_butterfly_factor: Positive = 1
    """Butterfly factors; each doubles how far a rotation reaches."""
    boft_dropout: Fraction = 0.0
    """Share of blocks that are left as they are in a step."""
    fourier_n_frequency: Positive = 2000
    """Trained frequencies of each target."""
    fourier_scaling: PositiveFloat = 300.0
    """Scale of the update."""
    bone_rank: Positive = 64
    """Width of a block of train_type bone."""
    bone_init: Literal["default", "bat"] = "default"
    """Blocks that are added, or that also depend on the weight (Bat)."""
    peft_options: dict[str, Any] = field(default_factory=dict)
    """Fields of peft's config, for the train types without keys of their own: {r: 8, alpha: 16}."""
    freeze_parameters: list[str] = field(default_factory=list)
    """Beginnings of names that stay as they are, as model.layers.0; language_model may be left out."""
    freeze_parameters_regex: str | None = None
    """Weights that stay as they are, by what is found in their names: model.layers.[0-5].* is six layers."""
    freeze_parameters_ratio: Share = 0.0
    """Share of all weights that stay as they are, from the pixels upwards."""
    trainable_parameters: list[str] = field(default_factory=list)
    """Beginnings of names that train whatever freezes them, as lm_head."""
    trainable_parameters_regex: str | None = None
    """Weights that train whatever freezes them, by what is found in their names."""
    unfreeze_topk_llm: NonNegative = 0
    """Last layers of the language model that train although freeze_llm is true."""
    unfreeze_topk_vit: NonNegative = 0
    """Last blocks of the vision tower that train although freeze_vit is true."""
    adapter_length: Positive = 128
    """Width of the network that train_type adapter puts after an MLP."""
    adapter_act: str = "gelu"
    """Its activation, by transformers' name."""
    reft_layers: list[NonNegative] | None = None
    """Layers of the language model whose output is edited; null is all."""
    reft_rank: Positive = 4
    """Rank of an edit."""
    reft_intervention_type: Literal["LoreftIntervention", "NoreftIntervention", "ConsreftIntervention"] = (
        "LoreftIntervention"
    )
    """Form of the edit: in an orthonormal subspace, in any, or to a constant."""
    reft_positions: str = "f1+l1"
    """Tokens that are edited: fP, the first P of each sample; lS, the last S of each prompt; fP+lS; or all."""
    llamapro_num_new_blocks: Positive = 4
    """New blocks, spread evenly over the language model; each starts as the identity."""
    longlora_group_size: Positive = 2048
    """Tokens that attend to one another while training; half of the heads shift by half of it. The paper takes a
    quarter of the context."""
    longlora_embeddings_and_norms: bool = True
    """Train embeddings and normalisation layers of the language model too, as the paper does."""

    def __post_init__(self) -> None:
        if isinstance(self.init_weights, str):
            self.init_weights = self.init_weights.lower()  # OLoRA, as the papers write it

    @property
    def changes_base(self) -> bool:
        """Whether LoRA's start is taken out of the base weights."""
        return str(self.init_weights).startswith(("pissa", "olora", "lora-ga"))
