"""The training method: settings that it cannot be combined with, and recipes that train nothing."""

from qwenvl_ft.recipe.checks.argument import argument
from qwenvl_ft.recipe.checks.launcher import sharded_by
from qwenvl_ft.recipe.methods import over_quantized
from qwenvl_ft.recipe.schema import Recipe


def initialisation(recipe: Recipe) -> str | None:
    """Initialisations that change quantised weights."""
    start, bits = recipe.tuner.init_weights, recipe.quantization.quantization_bit
    if bits and recipe.tuner.changes_base:
        return (
            f"tuner.init_weights={start} changes the base weights, but quantization.quantization_bit={bits} makes them "
            "constant. Use tuner.init_weights=loftq."
        )
    return None


def quantization(recipe: Recipe) -> str | None:
    """What cannot train or shard quantised weights."""
    train_type, bits = recipe.tuner.train_type, recipe.quantization.quantization_bit
    if bits is not None and train_type not in over_quantized():
        return (
            f"tuner.train_type={train_type} does not work over a quantised model (quantization.quantization_bit="
            f"{bits}). Set tuner.train_type to one of {', '.join(over_quantized())}."
        )
    if bits is not None and recipe.deepspeed.enabled and "zero3" in str(recipe.deepspeed.config):
        return (
            f"quantization.quantization_bit={bits} cannot be sharded by deepspeed.config={recipe.deepspeed.config}. "
            "Use zero2, or no DeepSpeed."
        )
    return None


def adalora_needs_gradients(recipe: Recipe) -> str | None:
    """AdaLoRA reads gradients after the optimizer's step, when sharding has freed them."""
    sharding = sharded_by(recipe)
    if recipe.tuner.train_type != "adalora" or sharding is None:
        return None
    return (
        f"tuner.train_type=adalora ranks weights by their gradients, which {sharding} does not keep. Remove {sharding} "
        "(accelerate launch runs several processes without it), or set tuner.train_type=lora."
    )


def second_stage(recipe: Recipe) -> str | None:
    """Methods and initialisations that cannot continue from an adapter."""
    tuner = recipe.tuner
    if not tuner.resume_from_checkpoint:
        return None
    if tuner.train_type in ("full", "llamapro"):
        return (
            f"tuner.resume_from_checkpoint={tuner.resume_from_checkpoint} continues an adapter, but tuner.train_type="
            f"{tuner.train_type} has none. Merge it first (qwenvl-ft merge) and set model.model to the result."
        )
    if str(tuner.init_weights).lower() not in ("true", "gaussian"):
        return (
            f"tuner.init_weights={tuner.init_weights} would change the model that the adapter of "
            "tuner.resume_from_checkpoint was trained on. Remove tuner.init_weights."
        )
    return None


def shared_rows(recipe: Recipe) -> str | None:
    """What needs all tokens of a row on one process, or takes each process to have rows of its own."""
    size, tuner = recipe.training.sequence_parallel_size, recipe.tuner
    setting = f"training.sequence_parallel_size={size}"
    if size == 1:
        return None
    if not recipe.training.padding_free:
        return f"{setting} shares packed or joined rows, but training.padding_free=false pads them. Remove one."
    counted = argument(recipe, "include_num_input_tokens_seen")
    if counted and counted != "no":
        return (
            f"training.include_num_input_tokens_seen={str(counted).lower()} counts a row on each process, so {setting} "
            f"would multiply it by {size}. Remove it; tokens_per_second counts each row once."
        )
    if tuner.train_type == "longlora":
        return (
            f"tuner.train_type=longlora shifts groups of tokens within a row, which {setting} would divide between "
            "processes. Set tuner.train_type=lora."
        )
    if tuner.train_type == "reft" and tuner.reft_positions != "all":
        return (
            f"tuner.reft_positions={tuner.reft_positions} counts the tokens of a prompt, which {setting} may divide "
            "between processes. Set tuner.reft_positions=all."
        )
    return None


def nothing_trains(recipe: Recipe) -> str | None:
    """All parts are frozen, and no key unfreezes anything."""
    tuner = recipe.tuner
    by_name = (tuner.modules_to_save, tuner.trainable_parameters, tuner.trainable_parameters_regex)
    last_layers = (tuner.unfreeze_topk_llm, tuner.unfreeze_topk_vit)
    if tuner.freeze_llm and tuner.freeze_vit and tuner.freeze_aligner and not any((*by_name, *last_layers)):
        return (
            "tuner.freeze_llm, freeze_vit and freeze_aligner are all true, so nothing would train. "
            "Set one of them to false."
        )
    return None
