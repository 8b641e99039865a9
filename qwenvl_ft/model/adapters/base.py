"""Base classes of this package's adapters: their config, the wrapper of a module, and the peft tuner."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, ClassVar

from torch import Tensor, nn

from qwenvl_ft.errors import CheckpointError
from qwenvl_ft.upstream.peft import BaseTunerLayer, PeftConfig, WrappingTuner


class OwnType(StrEnum):
    """``peft_type`` in ``adapter_config.json``; an enumeration because peft reads its ``value``."""

    BOTTLENECK = "BOTTLENECK"
    REFT = "REFT"


@dataclass
class OwnConfig(PeftConfig):
    """Settings common to all adapters of this package."""

    kind: ClassVar[OwnType]

    target_modules: list[str] | set[str] | str | None = field(default=None)
    """Full names of the modules that the adapter wraps."""
    exclude_modules: list[str] | str | None = field(default=None)
    modules_to_save: list[str] | None = field(default=None)
    """Modules trained in full beside the adapter."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = self.kind


class OwnLayer(nn.Module, BaseTunerLayer):
    """Wraps a module of the base model (``base_layer``), whose output the active adapters change."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.merged_adapters: list[str] = []

    def add(self, adapter_name: str, config: Any, **context: Any) -> None:
        """Create the weights of an adapter.

        Args:
            context: what a layer needs to know of its model; depends on the type of adapter.
        """
        raise NotImplementedError

    def changed(self, output: Tensor, adapter_name: str) -> Tensor:
        """Apply an adapter to the output of ``base_layer``; the result has the same shape and dtype."""
        raise NotImplementedError

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        output = self.base_layer(*args, **kwargs)
        for adapter_name in self._running():
            output = self.changed(output, adapter_name)
        return output

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Raise CheckpointError: these adapters change activations, not weights."""
        raise CheckpointError(
            f"an adapter of type {type(self).__name__} cannot be merged: it changes activations, not weights. Serve "
            "the base model with the adapter loaded on it."
        )

    def _running(self) -> Iterator[str]:
        """Yield the names of the active adapters that this layer has."""
        if not self.disable_adapters:
            weights = getattr(self, self.adapter_layer_names[0])
            yield from (name for name in self.active_adapters if name in weights)


class OwnTuner(WrappingTuner):
    """A peft tuner that wraps each target module in ``tuner_layer_cls``."""

    tuner_layer_cls: type[OwnLayer]

    def wrapped(self, module: nn.Module, adapter_name: str, config: OwnConfig) -> nn.Module:
        layer = module if isinstance(module, OwnLayer) else self.tuner_layer_cls(module)
        self.add_to(layer, adapter_name, config)
        layer.set_adapter(self.active_adapters, inference_mode=config.inference_mode)
        if adapter_name not in self.active_adapters:
            for names in layer.adapter_layer_names:
                weights = getattr(layer, names)
                if adapter_name in weights:
                    weights[adapter_name].requires_grad_(False)
        return layer

    def add_to(self, layer: OwnLayer, adapter_name: str, config: Any) -> None:
        """Create the weights of an adapter in a layer."""
        layer.add(adapter_name, config)
