"""Loads the experts of a Qwen3-VL MoE checkpoint by the layout of its files, under every engine.

The experts of a layer are two tensors, and two layouts are in use. E: experts, H: hidden size, I: inner size of one.

| layout | gate_up_proj | down_proj | written by |
|---|---|---|---|
| released | [E, H, 2I] | [E, I, H] | the released models, transformers 4.57 |
| module | [E, 2I, H] | [E, H, I] | transformers 5: the shapes of the model's parameters |

transformers 5.5 to 5.24 transposes a tensor whose shape differs from that of the parameter. This is wrong if the
parameter is partitioned by ZeRO-3, where it has shape [0] and everything is transposed, and if the tensor is square,
which is never transposed (its issue 47031). Here the layout is read from the headers of the files: the tensors of a
layer are never both square. The conversion that it takes is then registered with transformers for one load.

Relies on names of transformers that are public, but not documented in all versions: `transformers.conversion_mapping`
has ``get_checkpoint_conversion_mapping`` and ``register_checkpoint_conversion_mapping``, and
`transformers.core_model_loading` has ``Transpose``. Without them transformers decides, and the two cases above are
refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qwenvl_ft.errors import CheckpointError
from qwenvl_ft.upstream.probe import Feature, first, installed, lacks, takes

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Layout = Literal["released", "module"]
EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
"""Ends of the names of a layer's experts."""


def stored_layout(shapes: Mapping[str, Sequence[int]], config: PreTrainedConfig) -> Layout:
    """Return the layout of stored experts.

    Args:
        shapes: name -> shape of experts, both tensors of at least one layer.

    Raises:
        CheckpointError: a shape that fits the config in neither layout, or two layouts.
    """
    sizes: Any = config.get_text_config()
    experts, hidden, inner = sizes.num_experts, sizes.hidden_size, sizes.moe_intermediate_size
    module = {"gate_up_proj": (experts, 2 * inner, hidden), "down_proj": (experts, hidden, inner)}
    found: dict[Layout, str] = {}
    for name, shape in shapes.items():
        whole = module[name.rpartition(".")[2]]
        turned = (whole[0], whole[2], whole[1])
        if tuple(shape) not in (whole, turned):
            raise CheckpointError(f"{name} has shape {tuple(shape)}, but config.json gives {whole} or {turned}.")
        if whole != turned:
            found["module" if tuple(shape) == whole else "released"] = name
    if len(found) != 1:
        where = " and ".join(sorted(found.values())) or ", ".join(sorted(shapes)[:2])
        raise CheckpointError(f"the experts are stored in {len(found) or 'no known'} layouts: see {where}.")
    return next(iter(found))


def stored_experts(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return name and shape of all experts in a model's directory, from the headers of its safetensors files.

    Raises:
        SafetensorError, OSError: a file is damaged or missing.
    """
    from safetensors import safe_open

    index = folder / "model.safetensors.index.json"
    files = {"model.safetensors"}
    if index.is_file():
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = {file for name, file in names.items() if name.endswith(EXPERTS)}
    shapes: dict[str, tuple[int, ...]] = {}
    for file in sorted(files):
        with safe_open(str(folder / file), framework="pt") as opened:
            names = [name for name in opened.keys() if name.endswith(EXPERTS)]  # noqa: SIM118
            shapes |= {name: tuple(opened.get_slice(name).get_shape()) for name in names}
    return shapes


@contextmanager
def loading_layout(config: PreTrainedConfig, layout: Layout) -> Iterator[None]:
    """Let transformers load experts of this layout inside this context.

    Raises:
        CheckpointError: the installed transformers decides by shape, and would be wrong here.
    """
    if CONVERSION.missing():
        _require_shapes_decide(config)
        yield
        return
    from transformers import WeightConverter
    from transformers.conversion_mapping import (
        get_checkpoint_conversion_mapping,
        register_checkpoint_conversion_mapping,
    )
    from transformers.core_model_loading import Transpose

    before = get_checkpoint_conversion_mapping(config.model_type) or []
    changed: list[Any] = [entry for entry in before if not set(EXPERTS) & set(entry.source_patterns)]
    if layout == "released":
        changed += [WeightConverter(name, name, operations=[Transpose(1, 2)]) for name in EXPERTS]
    register_checkpoint_conversion_mapping(config.model_type, changed, overwrite=True)
    try:
        yield
    finally:
        register_checkpoint_conversion_mapping(config.model_type, before, overwrite=True)


def _require_shapes_decide(config: PreTrainedConfig) -> None:
    from transformers.integrations import is_deepspeed_zero3_enabled

    sizes: Any = config.get_text_config()
    square = sizes.hidden_size in (sizes.moe_intermediate_size, 2 * sizes.moe_intermediate_size)
    if square or is_deepspeed_zero3_enabled():
        case = "are square" if square else "are partitioned by ZeRO-3"
        raise CheckpointError(
            f"the experts of this model {case}, and {installed(('transformers',))} {CONVERSION.missing()}, without "
            "which they might be loaded transposed. Install a version that docs/compatibility.md lists."
        )


def _missing() -> str:
    needed = ("get_checkpoint_conversion_mapping", "register_checkpoint_conversion_mapping")
    mapping, loading = "transformers.conversion_mapping", "transformers.core_model_loading"
    if reason := first(
        lacks("transformers", ("WeightConverter",)), lacks(mapping, needed), lacks(loading, ("Transpose",))
    ):
        return reason
    from transformers import WeightConverter
    from transformers.core_model_loading import Transpose

    return first(
        takes(WeightConverter, "source_patterns", "target_patterns", "operations"), takes(Transpose, "dim0", "dim1")
    )


CONVERSION = Feature(
    name="loading experts by the layout of their files",
    missing=_missing,
    instead="transformers decides by their shapes; under ZeRO-3, and if they are square, they are refused",
)
FEATURES = (CONVERSION,)
