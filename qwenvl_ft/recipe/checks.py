"""Settings that are each right and cannot be together."""

import re
from itertools import chain
from typing import Any, get_args

from qwenvl_ft.errors import RecipeError, hint
from qwenvl_ft.recipe.dialects import TOKEN_PIXELS
from qwenvl_ft.recipe.keys import own_types
from qwenvl_ft.recipe.refused import fixed_fields, unread_keys
from qwenvl_ft.recipe.schema import GALORE, MIN_LR_SCHEDULES, QuantizationConfig, Recipe, TrainingConfig, TunerConfig
from qwenvl_ft.recipe.tuner import PeftsOwn
from qwenvl_ft.recipe.values import shown

CONSTANT = ("constant", "constant_with_warmup")
"""Schedules that do not lower the rate."""
GALORE_KEYS = (
    "galore_target_modules",
    "galore_rank",
    "galore_update_proj_gap",
    "galore_scale",
    "galore_proj_type",
)
PROJECTED = ("galore", "apollo")
"""Beginnings of the names of optimizers that project the gradients of chosen modules."""
SAMPLING = ("random", "group_by_length")
"""How an epoch's rows come into steps."""
LORAS = ("lora", "longlora")
OPTIONS_ONLY = get_args(PeftsOwn)
"""Train types of peft whose own settings are in peft_options."""
WITH_LORA = (*LORAS, "adalora")
"""Train types that have LoRA's matrices."""
PEFT = ("lora", "longlora", "adalora", "vera", "boft", "fourierft", "bone", *OPTIONS_ONLY)
OVER_BITS = (*LORAS, "adapter", "reft", "boft", "bone", "fourierft", "oft", "vera")
"""Train types that work over weights that bitsandbytes quantised: trained, resumed and merged in tests."""
KEYS_OF: dict[str, tuple[str, ...]] = {
    "lora_ga_": LORAS,
    "eva_": LORAS,
    "adalora_": ("adalora",),
    "adapter_": ("adapter",),
    "reft_": ("reft",),
    "llamapro_": ("llamapro",),
    "longlora_": ("longlora",),
    "vera_": ("vera",),
    "boft_": ("boft",),
    "fourier_": ("fourierft",),
    "bone_": ("bone",),
    **dict.fromkeys(("freeze_parameters", "trainable_", "unfreeze_topk_"), ("full",)),
}
"""Beginning of keys of ``tuner`` -> the train types that read them."""
METHOD_KEYS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("target_modules", "target_regex"), (*PEFT, "adapter")),
    **dict.fromkeys(("lora_rank", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern"), LORAS),
    **dict.fromkeys(("lora_alpha", "lora_dropout", "lora_bias", "lora_dtype"), WITH_LORA),
    **dict.fromkeys(("target_parameters", "init_weights"), LORAS),
    **{key: readers for begin, readers in KEYS_OF.items() for key in own_types("tuner") if key.startswith(begin)},
    "peft_options": OPTIONS_ONLY,
}
"""Key of ``tuner`` -> the train types that read it; the other keys are read by all."""
NEEDS = {
    "hub_model_id": "push_to_hub",
    "hub_always_push": "push_to_hub",
    "hub_private_repo": "push_to_hub",
    "hub_revision": "push_to_hub",
    "fsdp_config": "fsdp",
    "liger_kernel_config": "use_liger_kernel",
}
"""Field of ``training`` -> the one without which it is not read."""
CUDA_GRAPHS = {
    "torch_compile_mode": ("reduce-overhead", "max-autotune"),
    "torch_compile_backend": ("cudagraphs",),
}
"""Field of ``training`` -> the values that need shapes which do not change."""
DATASET_KEYS = ("annotation_path", "data_path", "reader")


def check(recipe: Recipe) -> None:
    """Raises RecipeError for the first contradiction, with the key to change."""
    for contradiction in CHECKS:
        told = contradiction(recipe)
        if told:
            raise RecipeError(told)


def _unread(recipe: Recipe) -> str | None:
    """What transformers takes and our training does not read, or cannot do otherwise."""
    values = recipe.training.arguments | {"lazy_tokenize": recipe.training.lazy_tokenize}
    return next(chain(fixed_fields(values, recipe.origins), unread_keys(values)), None)


def _checkpointing(recipe: Recipe) -> str | None:
    name = "activation_checkpointing_kwargs"
    told = _argument(recipe, name) or {}
    if not isinstance(told, dict):
        return f"training.{name}={shown(told)} is not a mapping. Example: {{every_n_layers: 2}}."
    for key, value in told.items():
        given = f"training.{name}.{key}={shown(value)}"
        if key == "use_reentrant" and value is not False:
            return (
                f"{given} gives no gradient to weights behind frozen ones, as adapters in the vision tower. "
                "Set it to false."
            )
        if key in ("offload", "preserve_rng_state", "early_stop") and not isinstance(value, bool):
            return f"{given} is not true or false."
        if key == "every_n_layers" and (type(value) is not int or value < 1):
            return f"{given} is not a whole number above 0. Example: 2."
        if key == "preserve_rng_state" and not value:
            return f"{given} would draw dropout anew in the backward pass. Remove it."
    return None


def _sampling(recipe: Recipe) -> str | None:
    told = _argument(recipe, "train_sampling_strategy")
    if told in (None, *SAMPLING):
        return None
    return (
        f"training.train_sampling_strategy={told} cannot be honoured: each epoch's rows are planned anew from lengths. "
        f"Use {' or '.join(SAMPLING)}."
    )


def _compile(recipe: Recipe) -> str | None:
    """CUDA graphs are recorded for one shape, and rows differ in length; two ways to fuse the same."""
    for name, values in CUDA_GRAPHS.items():
        told = _argument(recipe, name)
        if told in values:
            instead = "Use max-autotune-no-cudagraphs" if told == "max-autotune" else "Remove it"
            return f"training.{name}={told} records a CUDA graph for each length, and no two rows are alike. {instead}."
    compiled = any(_argument(recipe, name) for name in ("torch_compile", *CUDA_GRAPHS))
    if compiled and _argument(recipe, "use_liger_kernel"):
        return "training.torch_compile=true fuses what training.use_liger_kernel=true has fused already. Choose one."
    return None


def _lengths(recipe: Recipe) -> str | None:
    length, prepared = recipe.template.max_length, recipe.model.max_model_len
    if prepared is not None and length > prepared:
        return (
            f"template.max_length={length} exceeds model.max_model_len={prepared}. Lower the first or raise the "
            "second, or set both by global_max_length."
        )
    return None


def _output(recipe: Recipe) -> str | None:
    if not _argument(recipe, "output_dir").strip():
        return "training.output_dir is empty. Give a folder: training.output_dir=output."
    return None


def _method(recipe: Recipe) -> str | None:
    """A key that the train type does not read."""
    chosen = recipe.tuner.train_type
    for name, readers in METHOD_KEYS.items():
        value = getattr(recipe.tuner, name)
        if chosen not in readers and f"tuner.{name}" in recipe.origins and value != getattr(TunerConfig(), name):
            return (
                f"tuner.{name}={shown(value)} is not read by tuner.train_type={chosen}. Remove tuner.{name}, or set "
                f"tuner.train_type={readers[0]}."
            )
    return _start(recipe)


def _start(recipe: Recipe) -> str | None:
    """A start of LoRA that changes weights which cannot be changed, or a setting of one that is not chosen."""
    chosen = recipe.tuner.init_weights
    bits = recipe.quantization.quantization_bit
    if bits and recipe.tuner.changes_base:
        return (
            f"tuner.init_weights={chosen} changes the base weights, which quantization.quantization_bit={bits} fixes. "
            "Use tuner.init_weights=loftq."
        )
    for begin, reader in (("lora_ga_", "lora-ga"), ("eva_", "eva")):
        for key in own_types("tuner"):
            if key.startswith(begin) and f"tuner.{key}" in recipe.origins and chosen != reader:
                value = getattr(recipe.tuner, key)
                if value != getattr(TunerConfig(), key):
                    return (
                        f"tuner.{key}={shown(value)} is not read with tuner.init_weights={chosen}. Remove tuner.{key}, "
                        f"or set tuner.init_weights={reader}."
                    )
    return None


def _pixels(recipe: Recipe) -> str | None:
    low, high, length = recipe.template.min_pixels, recipe.template.max_pixels, recipe.template.max_length
    told = recipe.template
    for least, most in (
        ("min_pixels", "max_pixels"),
        ("video_min_pixels", "video_max_pixels"),
        ("fps_min_frames", "fps_max_frames"),
    ):
        smallest, largest = getattr(told, least), getattr(told, most)
        if smallest is not None and largest is not None and smallest > largest:
            return f"template.{least}={smallest} is above template.{most}={largest}. Lower the first."
    for name, pixels in (("min", low), ("max", high)):
        if pixels is not None and pixels // TOKEN_PIXELS >= length:
            return (
                f"template.{name}_pixels={pixels} lets one image take {pixels // TOKEN_PIXELS} tokens, but "
                f"template.max_length={length}. Lower the first or raise the second."
            )
    return None


def _datasets(recipe: Recipe) -> str | None:
    for name, entry in recipe.data.datasets.items():
        unknown = [key for key in entry if key not in DATASET_KEYS]
        if unknown:
            return f"data.datasets.{name}: unknown key {unknown[0]!r}.{hint(unknown[0], DATASET_KEYS)}"
        if "annotation_path" not in entry:
            return f"data.datasets.{name} has no annotation_path. Example: {name}: {{annotation_path: a.jsonl}}."
    return None


def _val_names(recipe: Recipe) -> str | None:
    for name in recipe.data.val if isinstance(recipe.data.val, dict) else ():
        if not re.fullmatch(r"\w+", name):
            return f"data.val names a set {name!r}, which is part of eval_NAME_loss. Use letters, digits and '_' only."
    return None


def _nothing_trains(recipe: Recipe) -> str | None:
    told = recipe.tuner
    named = (told.modules_to_save, told.trainable_parameters, told.trainable_parameters_regex)
    last = (told.unfreeze_topk_llm, told.unfreeze_topk_vit)
    if told.freeze_llm and told.freeze_vit and told.freeze_aligner and not any((*named, *last)):
        return (
            "tuner.freeze_llm, freeze_vit and freeze_aligner are all true, so nothing would train. "
            "Set one of them to false."
        )
    return None


def _packing(recipe: Recipe) -> str | None:
    training = recipe.training
    if not training.packing:
        return None
    if training.pack_dataset_break_mode == "break":
        return (
            "training.pack_dataset_break_mode=break would cut samples, and images with them. Use no_break_longest_only."
        )
    if not training.padding_free:
        return "training.padding_free=false pads one sample a row. Set training.packing=false with it."
    return None


def _placement(recipe: Recipe) -> str | None:
    fsdp = _argument(recipe, "fsdp")
    if recipe.deepspeed.enabled and recipe.model.device_map is not None:
        return "deepspeed.enabled=true places the model itself. Remove model.device_map."
    if recipe.deepspeed.enabled and fsdp:
        return f"deepspeed.enabled=true and training.fsdp={fsdp} both shard the model. Keep one."
    if fsdp and recipe.model.device_map is not None:
        return f"training.fsdp={fsdp} places the model itself. Remove model.device_map."
    if recipe.model.max_memory is not None and recipe.model.device_map is None:
        return "model.max_memory limits model.device_map, which is not set. Add model.device_map=auto."
    return None


def _evaluation(recipe: Recipe) -> str | None:
    strategy = _argument(recipe, "eval_strategy")
    wants = [
        name
        for name, on in (
            ("training.save_strategy=best", _argument(recipe, "save_strategy") == "best"),
            ("training.load_best_model_at_end=true", _argument(recipe, "load_best_model_at_end")),
            ("training.do_eval=true", _argument(recipe, "do_eval")),
            ("training.early_stopping_patience", recipe.training.early_stopping_patience is not None),
        )
        if on
    ]
    if recipe.training.arguments.get("do_eval") is False and strategy != "no":
        return (
            f"training.do_eval=false, but training.eval_strategy={strategy}. Set eval_strategy=no, or remove do_eval."
        )
    if _argument(recipe, "eval_on_start") and not recipe.data.evaluates:
        return "training.eval_on_start=true needs an evaluation set. Set data.val."
    if wants and not recipe.data.evaluates:
        return f"{wants[0]} needs an evaluation set. Set data.val."
    if wants and strategy == "no":
        return f"{wants[0]} needs evaluations. Set training.eval_strategy=steps and training.eval_steps."
    if strategy != "no" and not recipe.data.evaluates:
        return f"training.eval_strategy={strategy} needs an evaluation set. Set data.val."
    if recipe.evaluation.run_after_training and not (recipe.evaluation.data or recipe.data.evaluates):
        return "evaluation.run_after_training=true needs a set to ask about. Set evaluation.data or data.val."
    return None


def _metric(recipe: Recipe) -> str | None:
    name = _argument(recipe, "metric_for_best_model")
    if name is not None and _argument(recipe, "greater_is_better"):
        return (
            f"training.greater_is_better=true would keep the checkpoint with the highest {name}, which is the worst. "
            "Remove training.greater_is_better."
        )
    return None


def _optimizer(recipe: Recipe) -> str | None:
    targets, optim = _argument(recipe, "optim_target_modules"), _argument(recipe, "optim")
    if targets is not None and not str(optim).startswith(PROJECTED):
        return (
            f"training.optim_target_modules={shown(targets)} is read by GaLore and APOLLO alone, but training.optim="
            f"{optim or 'adamw_torch_fused'}. Remove it, or choose one of them."
        )
    return None


def _unfit(recipe: Recipe) -> str | None:
    """Optimizers that step inside the backward pass, cannot go on from a checkpoint, or want another schedule."""
    optim = str(_argument(recipe, "optim"))
    if optim in ("lomo", "adalomo") or optim.endswith("layerwise"):
        return (
            f"training.optim={optim} changes each weight as soon as its gradient is there, at one rate: "
            "gradient_accumulation_steps, max_grad_norm, vit_lr and aligner_lr would not hold. Use adafactor, "
            "galore_adamw or apollo_adamw."
        )
    if optim == "grokadamw":
        return "training.optim=grokadamw keeps a state that a checkpoint does not hold. Use adamw_torch_fused."
    kind = str(_argument(recipe, "lr_scheduler_type"))
    if optim.startswith("schedule_free") and kind not in CONSTANT:
        return (
            f"training.optim={optim} averages weights in place of a schedule, and training.lr_scheduler_type={kind} "
            "would lower the rate too. Set it to constant_with_warmup."
        )
    return None


def _galore(recipe: Recipe) -> str | None:
    told = recipe.training
    if not (told.use_galore or told.optimizer == "galore"):
        given = [name for name in GALORE_KEYS if getattr(told, name) != getattr(TrainingConfig(), name)]
        return (
            f"training.{given[0]} is read only with training.use_galore=true. Set it, or remove it." if given else None
        )
    if recipe.tuner.train_type not in ("full", "llamapro"):
        return (
            f"training.use_galore=true projects the gradients of weights, and tuner.train_type="
            f"{recipe.tuner.train_type} trains adapters. Set tuner.train_type=full, or remove it."
        )
    if recipe.deepspeed.enabled:
        return "training.use_galore=true needs whole gradients, which DeepSpeed flattens. Set deepspeed.enabled=false."
    optim = str(_argument(recipe, "optim") or "adamw_torch")
    if optim not in GALORE:
        return f"training.use_galore=true goes with training.optim={', '.join(GALORE)}; not with {optim}."
    for name in ("optim_args", "optim_target_modules"):
        if _argument(recipe, name) is not None:
            return f"training.use_galore=true sets training.{name}. Use the galore_ keys instead."
    return None


def _lora_plus(recipe: Recipe) -> str | None:
    told, chosen = recipe.training, recipe.tuner.train_type
    wanted = told.lorap_lr_ratio is not None or told.optimizer == "lorap"
    if wanted and chosen not in WITH_LORA:
        key = "lorap_lr_ratio" if told.lorap_lr_ratio is not None else "optimizer=lorap"
        return f"training.{key} is for LoRA's B matrices, and tuner.train_type={chosen} has none. Remove it."
    return None


def _lisa(recipe: Recipe) -> str | None:
    told = recipe.training
    if not told.lisa_activated_layers:
        if told.lisa_step_interval != TrainingConfig().lisa_step_interval:
            return "training.lisa_step_interval is read only with training.lisa_activated_layers. Set it, or remove it."
        return None
    given = f"training.lisa_activated_layers={told.lisa_activated_layers}"
    if recipe.tuner.train_type != "full" or recipe.tuner.freeze_llm:
        return f"{given} is for full training of the language model. Set tuner.train_type=full and freeze_llm=false."
    if recipe.deepspeed.enabled or _argument(recipe, "fsdp"):
        return f"{given} freezes layers on the way, which DeepSpeed and FSDP do not see. Train in one process."
    return None


def _quantization(recipe: Recipe) -> str | None:
    told, chosen = recipe.quantization, recipe.tuner.train_type
    bits = told.quantization_bit
    for name, default in vars(QuantizationConfig()).items():
        needed = "4" if name.startswith("bnb_4bit") else "4 or 8"
        read = bits == 4 if name.startswith("bnb_4bit") else bits is not None
        if getattr(told, name) != default and not read:
            return (
                f"quantization.{name} is read only with quantization.quantization_bit={needed}. Set it, or remove "
                f"quantization.{name}."
            )
    if bits is not None and chosen not in OVER_BITS:
        return (
            f"tuner.train_type={chosen} does not work over weights in few bits (quantization.quantization_bit={bits}). "
            f"Set tuner.train_type to one of {', '.join(OVER_BITS)}."
        )
    if bits is not None and recipe.deepspeed.enabled and "zero3" in str(recipe.deepspeed.config):
        return (
            f"quantization.quantization_bit={bits} cannot be sharded by deepspeed.config={recipe.deepspeed.config}. "
            "Use zero2, or no DeepSpeed."
        )
    return None


def _gradients_in_reach(recipe: Recipe) -> str | None:
    """AdaLoRA looks at gradients after the optimizer's step, when those who shard have given them up."""
    sharder = "deepspeed" if recipe.deepspeed.enabled else "training.fsdp" if _argument(recipe, "fsdp") else None
    if recipe.tuner.train_type != "adalora" or sharder is None:
        return None
    return (
        f"tuner.train_type=adalora weighs ranks by gradients, which {sharder} does not keep. Leave {sharder} out "
        "(accelerate launch runs several processes without it), or set tuner.train_type=lora."
    )


def _stage(recipe: Recipe) -> str | None:
    """What cannot go on from an adapter."""
    told, chosen = recipe.tuner.resume_from_checkpoint, recipe.tuner
    if not told:
        return None
    if chosen.train_type in ("full", "llamapro"):
        return (
            f"tuner.resume_from_checkpoint={told} goes on with an adapter, and tuner.train_type={chosen.train_type} "
            "has none. Merge it first (qwenvl-ft merge) and set model.model to the result."
        )
    if str(chosen.init_weights).lower() not in ("true", "gaussian"):
        return (
            f"tuner.init_weights={chosen.init_weights} would change the model that the adapter of "
            "tuner.resume_from_checkpoint was trained on. Remove tuner.init_weights."
        )
    return None


def _needs(recipe: Recipe) -> str | None:
    """What is read only where another field is set."""
    for name, needed in NEEDS.items():
        if _argument(recipe, name) and not _argument(recipe, needed):
            given = shown(_argument(recipe, name))
            return f"training.{name}={given} is read only with training.{needed}. Set it, or remove training.{name}."
    return None


def _best_metric(recipe: Recipe) -> str | None:
    """Evaluation gives a loss and its perplexity, and both again for each of several sets."""
    metric = _argument(recipe, "metric_for_best_model")
    names = ["", *(f"{name}_" for name in recipe.data.val)] if isinstance(recipe.data.val, dict) else [""]
    known = [f"eval_{name}{kind}" for name in names for kind in ("loss", "perplexity")]
    if metric is None or f"eval_{metric.removeprefix('eval_')}" in known:
        return None
    return f"training.metric_for_best_model={metric} is not what evaluation gives.{hint(metric, known)}"


def _best(recipe: Recipe) -> str | None:
    """The best checkpoint can only be loaded if it was saved when it was measured."""
    evaluate, save = _argument(recipe, "eval_strategy"), _argument(recipe, "save_strategy")
    if not _argument(recipe, "load_best_model_at_end") or save == "best":
        return None
    if save != evaluate:
        return (
            f"training.load_best_model_at_end=true needs a checkpoint at each evaluation, but training.save_strategy="
            f"{save} and training.eval_strategy={evaluate}. Make them equal, or set training.save_strategy=best."
        )
    every, measured = _argument(recipe, "save_steps"), _argument(recipe, "eval_steps")
    if save == "steps" and every >= 1 and measured >= 1 and every % measured:
        return (
            f"training.load_best_model_at_end=true needs checkpoints at evaluations, but training.save_steps={every} "
            f"is no multiple of training.eval_steps={measured}. Change one of them."
        )
    return None


def _precision(recipe: Recipe) -> str | None:
    if _argument(recipe, "bf16") and _argument(recipe, "fp16"):
        return "training.bf16 and training.fp16 are both true. Keep one."
    for name, half in (("bf16", "bfloat16"), ("fp16", "float16")):
        other = "fp16" if name == "bf16" else "bf16"
        refused = recipe.training.arguments.get(name) is False and not _argument(recipe, other)
        if refused and recipe.model.torch_dtype == half:
            return (
                f"training.{name}=false with model.torch_dtype={half} would hold trained weights in 16 bits, in which "
                f"small updates are lost. Remove training.{name}, or set model.torch_dtype=float32."
            )
    return None


def _schedule(recipe: Recipe) -> str | None:
    kind, options = _argument(recipe, "lr_scheduler_type"), _argument(recipe, "lr_scheduler_kwargs")
    if isinstance(options, dict) and "min_lr" in options and kind not in MIN_LR_SCHEDULES:
        return (
            f"training.lr_scheduler_type={kind} has no min_lr. Set training.lr_scheduler_kwargs=null, or use "
            "cosine_warmup_with_min_lr."
        )
    if isinstance(options, dict) and "min_lr" in options:
        try:
            options["min_lr"] = float(options["min_lr"])
        except (TypeError, ValueError):
            return f"training.lr_scheduler_kwargs.min_lr={shown(options['min_lr'])} is not a number. Example: 1e-6."
        others = [key for key in options if key != "min_lr" and (key, options[key]) != ("num_cycles", 0.5)]
        if others:
            return (
                f"training.lr_scheduler_kwargs.{others[0]} has no meaning beside min_lr, where the schedule is half a "
                "cosine down to it. Remove it."
            )
    return None


def _argument(recipe: Recipe, name: str) -> Any:
    """A field of TrainingArguments, None where neither the recipe nor our defaults say anything."""
    told = recipe.training.arguments
    return told[name] if name in told else None


CHECKS = (
    _output,
    _unread,
    _checkpointing,
    _sampling,
    _compile,
    _lengths,
    _method,
    _metric,
    _optimizer,
    _unfit,
    _galore,
    _lora_plus,
    _lisa,
    _quantization,
    _gradients_in_reach,
    _stage,
    _needs,
    _pixels,
    _datasets,
    _val_names,
    _nothing_trains,
    _packing,
    _placement,
    _evaluation,
    _best_metric,
    _best,
    _precision,
    _schedule,
)
