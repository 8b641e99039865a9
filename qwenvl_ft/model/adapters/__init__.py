"""Adapters that peft lacks, written as peft tuners: peft wraps, saves, loads and switches them like its own.

Their ``adapter_config.json`` names a ``peft_type`` of ours, so a checkpoint says what it is; `load_model` opens it.
"""

from __future__ import annotations


def register_adapters() -> None:
    """Make our types known to peft, which has no door for types that are not in its own list (peft 0.21)."""
    from peft import mapping

    from qwenvl_ft.model.adapters.bottleneck import BottleneckConfig, BottleneckTuner
    from qwenvl_ft.model.adapters.reft import ReftConfig, ReftTuner

    for config, tuner in ((BottleneckConfig, BottleneckTuner), (ReftConfig, ReftTuner)):
        kind = config.kind.value
        mapping.PEFT_TYPE_TO_CONFIG_MAPPING[kind] = config  # type: ignore[index]
        mapping.PEFT_TYPE_TO_TUNER_MAPPING[kind] = tuner  # type: ignore[index]
        mapping.PEFT_TYPE_TO_PREFIX_MAPPING[kind] = tuner.prefix  # type: ignore[index]
