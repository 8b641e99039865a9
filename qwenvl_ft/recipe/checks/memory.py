"""Placement, precision, compilation and recomputation of the model."""

from qwenvl_ft.recipe.checks.argument import argument
from qwenvl_ft.recipe.schema import Recipe
from qwenvl_ft.recipe.values import shown

CUDA_GRAPHS = {
    "torch_compile_mode": ("reduce-overhead", "max-autotune"),
    "torch_compile_backend": ("cudagraphs",),
}
"""Field of ``training`` -> its values that record CUDA graphs, which need constant shapes."""


def activation_checkpointing(recipe: Recipe) -> str | None:
    """Training is exact only with some options of ``torch.utils.checkpoint``."""
    name = "activation_checkpointing_kwargs"
    options = argument(recipe, name) or {}
    if not isinstance(options, dict):
        return f"training.{name}={shown(options)} is not a mapping. Example: {{every_n_layers: 2}}."
    for key, value in options.items():
        setting = f"training.{name}.{key}={shown(value)}"
        if key == "use_reentrant" and value is not False:
            return (
                f"{setting} gives no gradient to weights that follow frozen ones, such as adapters in the vision "
                "tower. Set it to false."
            )
        if key in ("offload", "preserve_rng_state", "early_stop") and not isinstance(value, bool):
            return f"{setting} is not true or false."
        if key == "every_n_layers" and (type(value) is not int or value < 1):
            return f"{setting} is not a whole number above 0. Example: 2."
        if key == "preserve_rng_state" and not value:
            return f"{setting} would use a different dropout mask in the backward pass. Remove it."
    return None


def compilation(recipe: Recipe) -> str | None:
    """CUDA graphs need constant shapes, but rows differ in length; and Liger kernels are fused already."""
    for name, values in CUDA_GRAPHS.items():
        value = argument(recipe, name)
        if value in values:
            fix = "Use max-autotune-no-cudagraphs" if value == "max-autotune" else "Remove it"
            return (
                f"training.{name}={value} records one CUDA graph per row length, and almost every row has a different "
                f"length. {fix}."
            )
    compiled = any(argument(recipe, name) for name in ("torch_compile", *CUDA_GRAPHS))
    if compiled and argument(recipe, "use_liger_kernel"):
        return "training.torch_compile=true and training.use_liger_kernel=true both fuse the same operations. Keep one."
    return None


def precision(recipe: Recipe) -> str | None:
    """Trainable weights need float32, or mixed precision over 16 bits."""
    for name, dtype in (("bf16", "bfloat16"), ("fp16", "float16")):
        other = "fp16" if name == "bf16" else "bf16"
        switched_off = argument(recipe, name) is False and not argument(recipe, other)
        if switched_off and recipe.model.torch_dtype == dtype:
            return (
                f"training.{name}=false with model.torch_dtype={dtype} would keep trainable weights in 16 bits, where "
                f"small updates are rounded away. Remove training.{name}, or set model.torch_dtype=float32."
            )
    return None
