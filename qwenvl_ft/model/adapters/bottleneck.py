"""Bottleneck adapters (Houlsby and others 2019, arXiv 1902.00751): a small network after a layer's MLP.

The MLP's output h becomes ``h + up(act(down(h)))`` before it is added to the residual stream. ``up`` starts at zero, so
an untrained adapter changes nothing. Letters: D hidden size, M ``length``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from transformers.activations import ACT2FN

from qwenvl_ft.model.adapters.base import OwnConfig, OwnLayer, OwnTuner, OwnType
from qwenvl_ft.upstream.whole import full_shape


@dataclass
class BottleneckConfig(OwnConfig):
    """Settings of a bottleneck adapter."""

    kind = OwnType.BOTTLENECK

    length: int = field(default=128)
    """Width of the bottleneck."""
    act: str = field(default="gelu")
    """Name of the activation in transformers (``ACT2FN``)."""


class BottleneckLayer(OwnLayer):
    """An MLP with its adapters, each of ``2 * M * D + M + D`` parameters."""

    adapter_layer_names = ("bottleneck_down", "bottleneck_up")

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.bottleneck_down = nn.ModuleDict()
        self.bottleneck_up = nn.ModuleDict()
        self.acts: dict[str, Any] = {}

    def add(self, adapter_name: str, config: BottleneckConfig, **context: Any) -> None:
        width = output_width(self.get_base_layer())
        down, up = nn.Linear(width, config.length), nn.Linear(config.length, width)
        nn.init.xavier_uniform_(down.weight)
        for parameter in (down.bias, up.weight, up.bias):
            nn.init.zeros_(parameter)
        self.bottleneck_down[adapter_name], self.bottleneck_up[adapter_name] = down, up
        self.acts[adapter_name] = ACT2FN[config.act]

    def changed(self, output: Tensor, adapter_name: str) -> Tensor:
        down: Any = self.bottleneck_down[adapter_name]
        up: Any = self.bottleneck_up[adapter_name]
        inner = self.acts[adapter_name](down(output.to(down.weight.dtype)))
        return output + up(inner.to(up.weight.dtype)).to(output.dtype)


class BottleneckTuner(OwnTuner):
    """The peft tuner of bottleneck adapters."""

    prefix = "bottleneck_"
    tuner_layer_cls = BottleneckLayer


def output_width(module: nn.Module) -> int:
    """Return D of an MLP's output: the input size of the router of a MoE layer, else that of its last Linear layer."""
    if hasattr(module, "gate"):
        return full_shape(module.gate.weight)[-1]  # type: ignore
    return [inner for inner in module.modules() if isinstance(inner, nn.Linear)][-1].out_features
