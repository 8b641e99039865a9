"""Optimizers and learning rate schedules."""

from qwenvl_ft.recipe.checks.argument import argument
from qwenvl_ft.recipe.checks.launcher import sharded_by
from qwenvl_ft.recipe.methods import WITH_LORA
from qwenvl_ft.recipe.schema import GALORE, Recipe
from qwenvl_ft.recipe.values import shown

CONSTANT = ("constant", "constant_with_warmup")
"""Schedules that do not lower the learning rate."""


def unsuitable(recipe: Recipe) -> str | None:
    """Optimizers that step inside the backward pass, cannot be resumed, or replace the schedule."""
    optim = str(argument(recipe, "optim"))
    if optim in ("lomo", "adalomo") or optim.endswith("layerwise"):
        return (
            f"training.optim={optim} updates each weight as soon as its gradient is computed, with one learning rate: "
            "gradient_accumulation_steps, max_grad_norm, vit_lr and aligner_lr would have no effect. Use adafactor, "
            "galore_adamw or apollo_adamw."
        )
    if optim == "grokadamw":
        return "training.optim=grokadamw has a state that checkpoints do not hold. Use adamw_torch_fused."
    schedule_type = str(argument(recipe, "lr_scheduler_type"))
    if optim.startswith("schedule_free") and schedule_type not in CONSTANT:
        return (
            f"training.optim={optim} averages weights instead of lowering the learning rate, but "
            f"training.lr_scheduler_type={schedule_type} would lower it too. Set it to constant_with_warmup."
        )
    return None


def low_rank(recipe: Recipe) -> str | None:
    """GaLore and APOLLO need full training and whole gradients, and the names of the weights that they project."""
    training, optim = recipe.training, str(argument(recipe, "optim") or "adamw_torch")
    by_key = training.use_galore or training.optimizer == "galore"
    if not by_key and not optim.startswith(("galore", "apollo")):
        return None
    setting = "training.use_galore=true" if by_key else f"training.optim={optim}"
    if recipe.tuner.train_type not in ("full", "llamapro"):
        return (
            f"{setting} projects the gradients of whole weights, but tuner.train_type="
            f"{recipe.tuner.train_type} trains adapters. Set tuner.train_type=full, or remove it."
        )
    if recipe.deepspeed.enabled:
        return f"{setting} needs whole gradients, which DeepSpeed flattens. Set deepspeed.enabled=false."
    if (sharding := sharded_by(recipe)) is not None:
        return f"{setting} needs whole gradients, which FSDP shards. Remove {sharding}."
    if not by_key:
        if argument(recipe, "optim_target_modules") is None:
            return (
                f"{setting} needs the names of the modules to project: training.optim_target_modules=[mlp,self_attn]."
            )
        return None
    if optim not in GALORE:
        return f"training.use_galore=true works with training.optim={', '.join(GALORE)}; not with {optim}."
    for name in ("optim_args", "optim_target_modules"):
        if argument(recipe, name) is not None:
            return f"training.use_galore=true sets training.{name}. Use the galore_ keys instead."
    return None


def lora_plus(recipe: Recipe) -> str | None:
    """LoRA+ needs LoRA's B matrices."""
    training, train_type = recipe.training, recipe.tuner.train_type
    if training.optimizer == "lorap" and train_type not in WITH_LORA:
        return (
            f"training.optimizer=lorap is for LoRA's B matrices, but tuner.train_type={train_type} has none. Remove it."
        )
    return None


def lisa(recipe: Recipe) -> str | None:
    """LISA needs full training of the language model without sharding."""
    training = recipe.training
    if not training.lisa_activated_layers:
        return None
    setting = f"training.lisa_activated_layers={training.lisa_activated_layers}"
    if recipe.tuner.train_type != "full" or recipe.tuner.freeze_llm:
        return f"{setting} needs full training of the language model. Set tuner.train_type=full and freeze_llm=false."
    if sharded_by(recipe) is not None:
        return f"{setting} freezes layers during training, which DeepSpeed and FSDP ignore. Remove them."
    if argument(recipe, "ddp_find_unused_parameters") is False:
        return f"{setting} freezes layers, so training.ddp_find_unused_parameters=false cannot hold. Remove it."
    return None


def schedule(recipe: Recipe) -> str | None:
    """With a minimum learning rate the schedule has one form. Converts ``min_lr`` to float."""
    options = argument(recipe, "lr_scheduler_kwargs")
    if not isinstance(options, dict) or "min_lr" not in options:
        return None
    try:
        options["min_lr"] = float(options["min_lr"])
    except (TypeError, ValueError):
        return f"training.lr_scheduler_kwargs.min_lr={shown(options['min_lr'])} is not a number. Example: 1e-6."
    others = [key for key in options if key != "min_lr" and (key, options[key]) != ("num_cycles", 0.5)]
    if others:
        return (
            f"training.lr_scheduler_kwargs.{others[0]} has no effect with min_lr, where the schedule is half a cosine "
            "down to it. Remove it."
        )
    return None
