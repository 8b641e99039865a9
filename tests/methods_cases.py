"""Rows and columns of the table of training methods that `methods_table` writes into docs/tuning.md."""

from dataclasses import dataclass, field

from qwenvl_ft.recipe.schema import TunerConfig

KINDS = ("dense", "moe")
FAMILIES = {"Qwen3.5": "qwen3_5", "Qwen3.5 MoE": "qwen3_5_moe"}
"""Column -> kind of model, for which a cell says whether all other columns are as for Qwen3-VL."""
NOT_RUN = "not run"
COLUMNS = {
    "start": "before training, the model computes the same as the base model",
    "isolated": "training changes every trainable weight and leaves every other weight bit-identical",
    "learns": "the loss on handwritten digits falls in 8 steps",
    "bfloat16": "base.yaml as shipped trains the weights that train in float32, and the loss falls",
    "loads": "a checkpoint opened by plain peft (or transformers) on the base model gives the same logits",
    "resumes": "a resumed run ends with the same bits as the uninterrupted one",
    "merges": "merged into the base model, plain transformers gives the same logits",
    "packs": "packed samples have the same logits and gradients as each alone",
    "recomputes": "activation checkpointing does not change any gradient",
    "experts": "whether the experts of a MoE model are trained by default",
}
"""Column -> meaning of a yes in it."""


@dataclass(frozen=True)
class Case:
    """A row of the table: settings at toy size, and the columns in which the method must fail, with reasons."""

    tuner: dict = field(default_factory=dict)
    cannot: dict = field(default_factory=dict)
    """Column -> reason for a no; the run asserts that the check fails."""
    rate: float = 3e-3
    """Learning rate of the run on digits."""
    arguments: dict = field(default_factory=dict)
    """TrainingArguments for the columns that run the trainer."""
    lisa: int = 0
    """Number of layers that LISA trains at a time; new ones are drawn every second step."""
    bits: str = "whole"
    """Precision of the base model, a key of BASES."""


LLM_ONLY = {"freeze_vit": True, "freeze_aligner": True}
BASES = {
    "whole": {},
    "nf4": {"quantization_bit": 4, "bnb_4bit_comp_dtype": "float32"},
    "int8": {"quantization_bit": 8},
}
"""Name -> the recipe's quantization section; computes in float32 so that values can be compared."""
DEEPSTACK = "model.visual.deepstack_merger_list"
"""Module that only Qwen3-VL has."""
NO_FIXED_START = {"start": "random by design"}
CASES = {
    "full": Case({"train_type": "full"}),
    "lora": Case(),
    "full, GaLore": Case(
        {"train_type": "full"},
        arguments={
            "optim": "galore_adamw",
            "optim_target_modules": ["q_proj", "down_proj"],
            "optim_args": "rank=8,update_proj_gap=2",
        },
    ),
    "full, LISA": Case({"train_type": "full"}, lisa=2),
    "lora, LoRA+": Case(arguments={"lorap_lr_ratio": 16.0}, rate=1e-3),
    "lora, lora_dtype": Case(
        {"lora_dtype": "bfloat16"}, dict.fromkeys(("loads", "packs", "merges"), "16-bit rounding")
    ),
    "lora, dropout": Case({"lora_dropout": 0.2}, {"packs": "other dropout masks"}),
    "lora, all biases": Case({"lora_bias": "all"}),
    "lora, aligner in full": Case({"modules_to_save": ["model.visual.merger", DEEPSTACK]}),
    "lora, router too": Case(
        {"target_parameters": ["experts.gate_up_proj", "experts.down_proj", "mlp.gate.weight"]},
    ),
    "lora, rank_pattern": Case({"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"mlp.linear_fc1": 8}}),
    "use_rslora": Case({"use_rslora": True}),
    "use_dora": Case({"use_dora": True}),
    "init_weights: gaussian": Case({"init_weights": "gaussian"}),
    "init_weights: pissa": Case({"init_weights": "pissa"}),
    "init_weights: pissa_niter_4": Case({"init_weights": "pissa_niter_4", "use_rslora": True}),
    "init_weights: olora": Case({"init_weights": "olora"}),
    "init_weights: lora-ga": Case({"init_weights": "lora-ga"}),
    "init_weights: eva": Case({"init_weights": "eva"}),
    "lora over 4 bits": Case(bits="nf4"),
    "lora over 8 bits": Case(bits="int8"),
    "loftq over 4 bits": Case(
        {"init_weights": "loftq"},
        {"start": "by design, starts closer to the 16-bit model than the plain 4-bit base"},
        bits="nf4",
    ),
    "pissa and use_dora": Case({"init_weights": "pissa", "use_dora": True}),
    "longlora": Case({"train_type": "longlora", "longlora_group_size": 16, **LLM_ONLY}),
    "adalora": Case(
        {
            "train_type": "adalora",
            "adalora_init_r": 6,
            "adalora_target_r": 3,
            "adalora_tinit": 2,
            "adalora_tfinal": 2,
            "adalora_deltaT": 2,
        },
        rate=3e-2,
    ),
    "llamapro": Case({"train_type": "llamapro", "llamapro_num_new_blocks": 2, **LLM_ONLY}),
    "adapter": Case({"train_type": "adapter", "adapter_length": 8}, {"merges": "changes no weight"}, rate=1e-2),
    "vera": Case({"train_type": "vera", "vera_rank": 16}, rate=0.1),
    "boft": Case({"train_type": "boft"}, rate=2e-2),
    "boft, blocks": Case({"train_type": "boft", "boft_block_num": 8}, rate=1e-2),
    "fourierft": Case({"train_type": "fourierft", "fourier_n_frequency": 200}, NO_FIXED_START, rate=3e-2),
    "reft": Case(
        {"train_type": "reft", "reft_positions": "f7+l7", "reft_rank": 8, **LLM_ONLY},
        {"merges": "depends on the position"},
        rate=3e-2,
    ),
    "bone": Case({"train_type": "bone", "bone_rank": 16}),
    "bone, bat": Case({"train_type": "bone", "bone_rank": 16, "bone_init": "bat"}),
    "c3a": Case({"train_type": "c3a", "peft_options": {"block_size": 16}}, NO_FIXED_START, rate=6e-2),
    "deft": Case({"train_type": "deft"}),
    "delora": Case({"train_type": "delora"}),
    "gralora": Case({"train_type": "gralora", "peft_options": {"r": 8}}),
    "hira": Case({"train_type": "hira", "peft_options": {"r": 8}}, rate=6e-2),
    "hra": Case({"train_type": "hra"}, rate=1e-2),
    "ia3": Case({"train_type": "ia3"}, rate=1e-1),
    "loha": Case({"train_type": "loha"}, rate=1e-2),
    "lokr": Case({"train_type": "lokr"}, rate=1e-2),
    "miss": Case({"train_type": "miss", "peft_options": {"r": 16}}),
    "oft": Case({"train_type": "oft", "peft_options": {"oft_block_size": 8}}, rate=1e-2),
    "psoft": Case({"train_type": "psoft", "peft_options": {"r": 8}}, rate=1e-1),
    "randlora": Case({"train_type": "randlora", "peft_options": {"r": 16}}),
    "road": Case({"train_type": "road", "peft_options": {"group_size": 16}}, rate=1e-1),
    "shira": Case({"train_type": "shira", "peft_options": {"r": 4}}),
    "tinylora": Case({"train_type": "tinylora", "peft_options": {"r": 8, "u": 512}}, rate=3e-1),
    "vblora": Case(
        {"train_type": "vblora", "peft_options": {"vector_length": 16, "num_vectors": 32}}, NO_FIXED_START, rate=3e-2
    ),
    "waveft": Case({"train_type": "waveft", "peft_options": {"n_frequency": 100}}),
}
MOE_ONLY_KEYS = ("target_parameters",)
"""Settings that only apply to models with experts."""


def tuner_of(case: Case, kind: str) -> TunerConfig:
    unfrozen = {"freeze_llm": False, "freeze_vit": False, "freeze_aligner": False, "lora_dropout": 0.0}
    settings = {k: v for k, v in case.tuner.items() if kind.endswith("moe") or k not in MOE_ONLY_KEYS}
    if kind.startswith("qwen3_5") and "modules_to_save" in settings:
        settings["modules_to_save"] = [name for name in settings["modules_to_save"] if name != DEEPSTACK]
    return TunerConfig(**(unfrozen | settings))
