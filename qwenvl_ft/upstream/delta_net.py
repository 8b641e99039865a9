"""Restarts gated delta-net layers at the border of each sample in a packed row (qwen3_5, qwen3_5_moe).

A gated delta net reads its tokens in order, with a short causal convolution and a recurrent state. In a packed row both
run on from one sample into the next: transformers uses sample borders only in the kernels of flash-linear-attention and
causal-conv1d, and raises or leaks without them. Hooks change the row instead, so that every kernel is exact, torch's
own as well as those:

- A forward pre-hook of ``linear_attn`` folds the row into a rectangle (`Fold`). Each sample begins at the start of a
  chunk, and zeros separate it from the one before. The kernels then work on several samples at once, which also makes
  torch's loop over chunks as short as the longest sample.
- In the last slot before a sample, ``in_proj_a`` gets a value for which the decay of the state is 0, so the state
  restarts. Slots without a token get 0 from ``in_proj_qkv`` and a write strength of 0 from ``in_proj_b``.
- A forward hook of ``linear_attn`` takes the tokens out of the rectangle.

This relies on the names of these modules, on ``conv_kernel_size``, on chunks of 64 tokens, and on ``cu_seq_lens_q`` or
``position_ids`` as keyword arguments of a layer: transformers 5.5 to 5.24. A model of a few hundred weights shows
whether packed equals alone (`RESTARTS`); if not, models with such layers are refused.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from qwenvl_ft.errors import one_line
from qwenvl_ft.upstream.attention import TensorCache
from qwenvl_ft.upstream.cache import named
from qwenvl_ft.upstream.probe import Feature, first, lacks

MIXER = "linear_attn"
"""Name of the gated delta net in a decoder layer."""
CHUNK = 64
"""Tokens of a chunk in the kernels of torch and flash-linear-attention. Within a chunk, decays are differences of
cumulative sums, so a restart in the middle of one would cost precision."""
MARK = "qwenvl_ft_restarting"
"""Attribute set on modules that have a hook."""

LengthsOf = Callable[[Tensor | None, Tensor | None, int, int], list[int]]
"""(``cu_seq_lens_q`` int32[S+1] or None, text positions int64[B, T] or None, B, T) -> the lengths of the samples."""


@dataclass(frozen=True)
class Fold:
    """Where the tokens of a flat row of N tokens are in a rectangle of ``rows x width`` slots."""

    rows: int
    width: int
    places: Tensor
    """int64[N], the slot of each token, counted through the rectangle row by row."""
    empty: Tensor
    """int64[E], the slots without a token."""
    restarts: Tensor
    """int64[R], the slots after which another sample begins in the same row."""

    def fold(self, flat: Tensor) -> Tensor:
        """Put tokens ``[N, D]`` into their slots ``[rows, width, D]``, with zeros in the empty ones."""
        slots = flat.new_zeros(self.rows * self.width, flat.shape[-1])
        return slots.index_copy(0, self.places, flat).view(self.rows, self.width, -1)

    def unfold(self, folded: Tensor) -> Tensor:
        """Return the tokens ``[N, D]`` of ``[rows, width, D]``."""
        return folded.flatten(0, 1).index_select(0, self.places)


def make_fold(lengths: list[int], gap: int, device: torch.device | str = "cpu") -> Fold:
    """Fold samples into rows as wide as the longest one, the longest first, each into the first row with space for it.

    Args:
        lengths: tokens of each sample, in the order of the row.
        gap: least number of zeros between two samples; one less than the width of the convolution.

    Example:
        Lengths 100, 30, 20 with a gap of 3 make two rows of 100: the first sample, and the second with the third at 64.
    """
    width = max(lengths)
    used: list[int] = []
    starts = [0] * len(lengths)
    restarts: list[int] = []
    for sample in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        length = lengths[sample]
        row = next((row for row, filled in enumerate(used) if filled + length <= width), len(used))
        if row == len(used):
            used.append(0)
        starts[sample] = row * width + used[row]
        if used[row]:
            restarts.append(starts[sample] - 1)
        used[row] += -(-(length + gap) // CHUNK) * CHUNK
    places = torch.cat([torch.arange(length) + start for start, length in zip(starts, lengths, strict=True)])
    is_empty = torch.ones(len(used) * width, dtype=torch.bool).index_fill(0, places, False)
    empty = is_empty.nonzero(as_tuple=True)[0]
    return Fold(
        len(used), width, places.to(device), empty.to(device), torch.tensor(restarts, dtype=torch.int64).to(device)
    )


def restart_at_borders(model: nn.Module, lengths_of: LengthsOf) -> int:
    """Hook each layer of ``model`` that has a gated delta net, and return their number. Weights do not change.

    Args:
        lengths_of: returns the lengths of the samples in a row.

    Raises:
        RecipeError: the installed transformers computes packed rows otherwise than expected.
    """
    layers = [layer for layer in model.modules() if isinstance(getattr(layer, MIXER, None), nn.Module)]
    layers = [layer for layer in layers if MARK not in vars(layer)]
    if layers:
        RESTARTS.require("model.model=a Qwen3.5 model")
    for layer in layers:
        _hook(layer, lengths_of)
    return len(layers)


def _hook(layer: nn.Module, lengths_of: LengthsOf) -> None:
    restarting = _Restarting(lengths_of)
    mixer: Any = getattr(layer, MIXER)
    layer.register_forward_pre_hook(restarting.of_layer, with_kwargs=True)
    mixer.register_forward_pre_hook(restarting.before, with_kwargs=True)
    mixer.register_forward_hook(restarting.after)
    setattr(layer, MARK, True)


_FOLDS = TensorCache()


class _Restarting:
    """Hooks of one layer, its gated delta net, and the projections in it."""

    def __init__(self, lengths_of: LengthsOf) -> None:
        self.lengths_of = lengths_of
        self.borders: Tensor | None = None
        self.positions: Tensor | None = None
        self.fold: Fold | None = None
        self.shape = torch.Size()

    def of_layer(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the layer, which may not pass on to its mixer what says where samples begin."""
        kwargs = named(layer, args, kwargs)
        self.borders = kwargs.get("cu_seq_lens_q")
        cached = any(kwargs.get(name) is not None for name in ("cache", "past_key_values"))
        is_flat = kwargs.get("attention_mask") is None and not cached
        self.positions = kwargs.get("position_ids") if is_flat else None

    def before(self, mixer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Forward pre-hook of the gated delta net: fold ``hidden_states`` [B, T, D]."""
        kwargs = {name: value for name, value in named(mixer, args, kwargs).items() if name not in _OF_ATTENTION}
        hidden = kwargs["hidden_states"]
        self.shape = hidden.shape
        self.fold = self._fold(mixer, hidden)
        if self.fold is not None:
            kwargs["hidden_states"] = self.fold.fold(hidden.flatten(0, 1))
            kwargs["attention_mask"] = None
            for name, fill in (("in_proj_a", self._restart), ("in_proj_b", self._write_nothing)):
                _hook_once(getattr(mixer, name), fill)
            if any(name.endswith("bias") for name, _ in mixer.in_proj_qkv.named_parameters()):
                _hook_once(mixer.in_proj_qkv, self._no_value)
        return (), kwargs

    def after(self, mixer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """Forward hook of the gated delta net: return the tokens, [B, T, D]."""
        fold, self.fold = self.fold, None
        return output if fold is None else fold.unfold(output).view(*self.shape[:-1], -1)

    def _fold(self, mixer: Any, hidden: Tensor) -> Fold | None:
        """Return the fold of a row; None if every row of the batch is one sample. It is the same for all layers."""
        source = self.borders if self.borders is not None else self.positions
        if source is None:
            return None
        rows, tokens = hidden.shape[:2]

        def make() -> Fold | None:
            lengths = [length for length in self.lengths_of(self.borders, self.positions, rows, tokens) if length]
            return None if lengths == [tokens] * rows else make_fold(lengths, mixer.conv_kernel_size - 1, hidden.device)

        return _FOLDS.get(source, make)

    def _restart(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        # The decay is exp(-exp(A_log) * softplus(output + dt_bias)).
        return self._fill(output, "restarts", 6e4 if output.dtype == torch.float16 else 1e9)

    def _write_nothing(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return self._fill(output, "empty", -6e4)  # the strength is sigmoid(output)

    def _no_value(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return self._fill(output, "empty", 0.0)

    def _fill(self, output: Tensor, slots: str, value: float) -> Tensor:
        if self.fold is None:
            return output
        return output.flatten(0, 1).index_fill(0, getattr(self.fold, slots), value).view_as(output)


_OF_ATTENTION = "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "position_ids"
"""Arguments about the row's samples. A gated delta net must not get them: its kernels would apply them to the
rectangle, or raise without flash-linear-attention."""


def _hook_once(module: nn.Module, hook: Callable[..., Any]) -> None:
    """Register a forward hook; an adapter may have wrapped the module since the last call."""
    if MARK not in vars(module):
        module.register_forward_hook(hook)
        setattr(module, MARK, True)


@cache
def _leaks() -> str:
    """Return the reason why a packed row does not equal its samples alone; empty if it does.

    A model of a few thousand weights computes both, on the GPU if there is one: where flash-linear-attention or
    causal-conv1d are installed, transformers calls their kernels for tensors on a CPU too, and they fail.
    """
    where = "transformers.models.qwen3_5"
    if missing := first(
        lacks(f"{where}.modeling_qwen3_5", ("Qwen3_5TextModel",)),
        lacks(f"{where}.configuration_qwen3_5", ("Qwen3_5TextConfig",)),
    ):
        return missing
    from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5TextModel

    device, dtype = trial_place()
    try:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.manual_seed(0)
            model: Any = Qwen3_5TextModel(_small())
            return _difference(model.to(device, dtype).eval())
    except Exception as error:
        return f"fails on a tiny Qwen3.5 when a packed row is tried ({type(error).__name__}: {one_line(error, 80)})"


def trial_place() -> tuple[torch.device, torch.dtype]:
    """Return where and in which dtype to try: kernels of flash-linear-attention want 16 bits in some releases."""
    if not torch.cuda.is_available():
        return torch.device("cpu"), torch.float32
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK") or 0)), torch.bfloat16


def _difference(model: Any) -> str:
    lengths = [70, 61, 3]  # the last one begins in the row of the one before, right after the gap
    place, dtype = model.norm.weight.device, model.norm.weight.dtype
    embeds = torch.randn(1, sum(lengths), model.config.hidden_size).to(place, dtype)
    positions = torch.cat([torch.arange(length) for length in lengths]).expand(4, 1, -1).to(place)

    def run(inputs: Tensor, place: Tensor) -> Tensor:
        return model(inputs_embeds=inputs, position_ids=place, use_cache=False).last_hidden_state

    with torch.no_grad():
        pieces = [slice(start, end) for start, end in pairwise([0, 70, 131, 134])]
        alone = torch.cat([run(embeds[:, piece], positions[..., piece]) for piece in pieces], dim=1)
        for layer in model.layers:
            if hasattr(layer, MIXER):
                _hook(layer, lambda borders, positions, rows, tokens: lengths)
        packed = run(embeds, positions)
    # A sample that sees others is off by 0.1 or more.
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    return "" if torch.allclose(alone, packed, rtol=1e-4, atol=tolerance) else LEAKS


def _small() -> Any:
    """Return the config of the smallest text model with a gated delta net."""
    from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5TextConfig

    return Qwen3_5TextConfig(
        vocab_size=8,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=16,
        linear_num_key_heads=1,
        linear_num_value_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        layer_types=["linear_attention", "linear_attention"],
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 1e4,
            "mrope_section": [1, 1, 0],
            "partial_rotary_factor": 0.25,
        },
        initializer_range=0.2,  # with transformers' 0.02, a sample that sees others is hardly off
        use_cache=False,
    )


LEAKS = "lets samples of a packed row see each other"
RESTARTS = Feature(name="packing samples for gated delta-net layers", missing=_leaks)
