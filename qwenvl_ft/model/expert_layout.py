"""Tells in which of two layouts the weights of MoE experts are stored, from their shapes.

The released Qwen3-VL-MoE checkpoints, transformers 4.57, vLLM and SGLang multiply rows by the weights; the modules of
transformers 5 multiply by the transposed weights, and its ``save_pretrained`` leaves them so:

| | ``experts.gate_up_proj`` | ``experts.down_proj`` |
|---|---|---|
| released | [E, H, 2 I] | [E, I, H] |
| module | [E, 2 I, H] | [E, H, I] |

E is the number of experts, H the model's hidden size and I the size inside an expert.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from qwenvl_ft.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

FUSED = re.compile(r"\.experts\.(gate_up_proj|down_proj)$")
"""End of the name of a fused expert weight."""
Layout = Literal["released", "module"]


def stored_layout(shapes: Mapping[str, Iterable[int]], config: PreTrainedConfig) -> Layout | None:
    """Return the layout of the fused expert weights among ``shapes``; None if there are none.

    A square weight has the same shape in both layouts. ``gate_up_proj`` and ``down_proj`` are never both square, so
    all weights of a file together decide, and all must agree.

    Args:
        shapes: name -> shape; other names, and parameters whose shape is not three-dimensional, are not looked at.
        config: the model's config.

    Raises:
        CheckpointError: a shape fits neither layout, two weights differ in layout, or only square ones are given.
    """
    text: Any = config.get_text_config()
    layouts: dict[Layout, str] = {}
    square = ""
    for name, given in shapes.items():
        found, shape = FUSED.search(name), tuple(given)
        if found is None or len(shape) != 3:
            continue
        hidden, inner = text.hidden_size, text.moe_intermediate_size
        released = (hidden, 2 * inner) if found[1] == "gate_up_proj" else (inner, hidden)
        if shape[1:] not in (released, released[::-1]):
            raise CheckpointError(
                f"{name} has the shape {list(shape)}, but hidden_size={hidden} and moe_intermediate_size={inner} of "
                f"config.json give {[shape[0], *released]}."
            )
        if released[0] == released[1]:
            square = name
        else:
            layouts.setdefault("released" if shape[1:] == released else "module", name)
    if len(layouts) > 1:
        raise CheckpointError(
            f"{layouts['released']} has the layout of the released models, and {layouts['module']} that of "
            "transformers 5. Write the checkpoint again with one of them."
        )
    if square and not layouts:
        raise CheckpointError(
            f"{square} is square, so it does not say in which layout it is stored. Put gate_up_proj and down_proj of a "
            "layer into one file."
        )
    return next(iter(layouts), None)
