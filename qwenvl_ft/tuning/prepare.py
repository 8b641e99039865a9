"""Turns a loaded model into one that can be trained, and prints the table of trainable parameters."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qwenvl_ft.errors import RecipeError, unknown_name
from qwenvl_ft.model.anatomy import PARTS, canonical_name, part_of
from qwenvl_ft.model.quantization import quantized_modules, require_adapter_over_quantized
from qwenvl_ft.tuning.freeze_flags import freeze_flags_of, frozen_parts
from qwenvl_ft.tuning.methods import METHODS
from qwenvl_ft.tuning.stages import Earlier
from qwenvl_ft.tuning.targets import saved_modules
from qwenvl_ft.upstream.whole import full_size

if TYPE_CHECKING:
    from torch import nn

    from qwenvl_ft.recipe.schema import TunerConfig

PREPARED = "_qwenvl_ft_tuner"
"""Attribute of a prepared model that holds its tuner section."""


def prepare_model(model: nn.Module, tuner: TunerConfig, *, batches: Sequence[Any] | None = None) -> Any:
    """Freeze and adapt a model according to ``tuner``. Call it once, before the trainer is built.

    Args:
        batches: batches of the collator, for ``init_weights`` lora-ga and eva, which are computed from data.

    Returns:
        The model itself for ``full`` and ``llamapro``, a PeftModel for adapters.

    Raises:
        RecipeError: an unknown train type, names that match nothing, nothing to train, or a model that has an adapter
            already.
        CheckpointError: the adapter in ``resume_from_checkpoint`` cannot be loaded.
    """
    if tuner.train_type not in METHODS:
        raise unknown_name("tuner.train_type", tuner.train_type, METHODS)
    if hasattr(model, "peft_config"):
        raise RecipeError(
            "the model has an adapter already, and a second one would train on top of it. Set model.model to the base "
            "model and tuner.resume_from_checkpoint to the adapter, or merge it first (qwenvl-ft merge)."
        )
    earlier, quantized = Earlier.of(tuner), bool(quantized_modules(model))
    saved = saved_modules(model, tuner) if earlier or quantized else []
    if quantized:
        require_adapter_over_quantized(model, tuner, saved)
    method = METHODS[tuner.train_type]
    prepared = method.build(model, tuner, **({"batches": batches} if method.reads_data else {}))
    if earlier is not None:
        earlier.load(prepared, tuner, saved)
    check_prepared(prepared, tuner)
    setattr(prepared, PREPARED, copy.deepcopy(tuner))
    return prepared


def tuner_of(model: nn.Module) -> TunerConfig | None:
    """Return the tuner section by which `prepare_model` prepared a model; None if it did not."""
    return getattr(model, PREPARED, None)


def check_prepared(model: nn.Module, tuner: TunerConfig) -> None:
    """Raise unless exactly the parameters that ``tuner`` selects are trainable.

    Raises:
        RecipeError: nothing is trainable, the adapter is missing, or other weights are trainable too.
    """
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not trained:
        frozen = frozen_parts(tuner)
        fix = f"Unfreeze a part ({freeze_flags_of(frozen)})" if frozen else "Freeze less in tuner.freeze_parameters"
        raise RecipeError(
            f"nothing is left to train: tuner.train_type={tuner.train_type} with {', '.join(frozen) or 'all'} frozen. "
            f"{fix} or name modules in tuner.modules_to_save."
        )
    method = METHODS[tuner.train_type]
    if method.check is not None:
        method.check(model, tuner)
    if method.adapter:
        if not hasattr(model, "peft_config"):
            raise RecipeError(
                f"tuner.train_type={tuner.train_type}, but the model has no adapter and all of it would train. "
                "Call prepare_model(model, recipe.tuner) and pass its result to the trainer."
            )
        expected = (_adapter_prefix(model), ".modules_to_save.", "bias")
        base = [name for name in trained if not any(mark in name for mark in expected)]
        if base:
            raise RecipeError(
                f"tuner.train_type={tuner.train_type}, but {len(base)} weights of the base model would train too, "
                f"the first is {base[0]}. Pass the result of prepare_model to the trainer unchanged."
            )


def trainable_table(model: nn.Module, learning_rates: Mapping[str, float]) -> str:
    """Return a table with the parameters, trainable parameters, LoRA parameters and learning rate of each part.

    Args:
        learning_rates: part -> rate; shown for parts with trainable parameters.

    Example:
        ::

            part    parameters  trainable    LoRA  learning rate
            vision     281,664          0       0  frozen
            merger     330,624          0       0  frozen
            llm        234,176     40,960  40,960  0.0001
            total      846,464     40,960  40,960  4.84% trainable
    """
    counts = {part: {"parameters": 0, "trainable": 0, "LoRA": 0} for part in PARTS}
    out_of_reach = on_experts = 0
    prefix = _adapter_prefix(model)
    names = [name for name, _ in model.named_parameters() if prefix and prefix in name]
    adapted = {canonical_name(name).partition(prefix)[0] for name in names}
    for name, parameter in model.named_parameters():
        count = counts[part_of(name)]
        size = full_size(parameter)
        adapter = prefix in name if prefix else False
        count["LoRA"] += size * adapter
        count["trainable"] += size * parameter.requires_grad
        count["parameters"] += size * (not adapter and ".modules_to_save." not in name)
        on_experts += size * (adapter and ".mlp.experts." in name)
        owner = canonical_name(name).rpartition(".")[0]
        left_out = owner.endswith((".mlp.experts", ".mlp.gate")) and owner not in adapted
        out_of_reach += size * (left_out and bool(prefix) and not parameter.requires_grad)
    rows: list[tuple[str, ...]] = [("part", "parameters", "trainable", "LoRA", "learning rate")]
    for part, count in counts.items():
        rate = f"{learning_rates[part]:g}" if count["trainable"] else "frozen"
        rows.append((part, *(f"{value:,}" for value in count.values()), rate))
    total = [sum(count[column] for count in counts.values()) for column in ("parameters", "trainable", "LoRA")]
    rows.append(("total", *(f"{value:,}" for value in total), f"{total[1] / max(1, total[0]):.2%} trainable"))
    lines = _align(rows)
    if on_experts:
        lines.append(f"experts: {on_experts:,} of the LoRA weights; tuner.target_parameters=[] leaves them out")
    if out_of_reach:
        lines.append(f"not reached by LoRA: experts and routers (not Linear layers), {out_of_reach:,} parameters")
    return "\n".join(lines)


def _adapter_prefix(model: Any) -> str:
    """Return the prefix of the adapter's weights in parameter names (``.lora_``); empty without an adapter."""
    if not hasattr(model, "peft_config"):
        return ""
    from qwenvl_ft.upstream.peft import prefix_of

    config = next(iter(model.peft_config.values()))
    return f".{prefix_of(config.peft_type)}"


def _align(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for first, *numbers, last in rows:
        middle = "  ".join(text.rjust(width) for text, width in zip(numbers, widths[1:-1], strict=True))
        lines.append(f"{first.ljust(widths[0])}  {middle}  {last}")
    return lines
