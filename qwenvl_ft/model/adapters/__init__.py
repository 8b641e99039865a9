"""Adapters that peft lacks, written as peft tuners: peft wraps, saves, loads and switches them like its own.

Their ``adapter_config.json`` names a ``peft_type`` of ours, so a checkpoint says what it is; `load_model` opens it.
"""

from __future__ import annotations


def register_adapters() -> None:
    """Make our types known to peft."""
    from qwenvl_ft.model.adapters.bottleneck import BottleneckConfig, BottleneckTuner
    from qwenvl_ft.model.adapters.interventions import ReftConfig, ReftTuner
    from qwenvl_ft.upstream.peft import register_type

    register_type(BottleneckConfig.kind.value, BottleneckConfig, BottleneckTuner)
    register_type(ReftConfig.kind.value, ReftConfig, ReftTuner)
