"""Adapters that peft lacks, written as peft tuners, so that peft wraps, saves, loads and switches them like its own.

Their ``adapter_config.json`` has a ``peft_type`` of this package, by which `load_model` recognises a checkpoint.
"""

from __future__ import annotations


def register_adapters() -> None:
    """Register the adapter types of this package with peft."""
    from qwenvl_ft.model.adapters.bottleneck import BottleneckConfig, BottleneckTuner
    from qwenvl_ft.model.adapters.interventions import ReftConfig, ReftTuner
    from qwenvl_ft.upstream.peft import register_type

    register_type(BottleneckConfig.kind.value, BottleneckConfig, BottleneckTuner)
    register_type(ReftConfig.kind.value, ReftConfig, ReftTuner)
