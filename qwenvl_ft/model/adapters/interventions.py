"""Representation fine-tuning (Wu and others 2024, arXiv 2404.03592): edit hidden states at a few positions.

At the edited positions, and nowhere else, the output h of a decoder layer becomes

- LoReFT   ``h + R'(W h + b - R h)``, the rows of R orthonormal
- NoReFT   ``h + R'(W h + b - R h)``, R any matrix
- ConsReFT ``h + R'(b - R h)``, the rows of R orthonormal

where R' is the transpose of R. R is the orthonormal basis (by QR) of the stored matrix A. In LoReFT and NoReFT, W
starts as R and b at zero, so an untrained edit changes nothing; ConsReFT replaces a subspace from the start.

Positions: ``fP+lS`` means the first P tokens of each sample and the last S tokens of each prompt, directly before its
answer. Answers are never edited, neither in training nor in generation. ``all`` means every position. All edited
positions of a layer share its weights. Letters: B rows, T tokens, D hidden size, Q rank, K edited positions.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qwenvl_ft.data.conversation import IGNORE
from qwenvl_ft.errors import CheckpointError, RecipeError
from qwenvl_ft.model.adapters.base import OwnConfig, OwnLayer, OwnTuner, OwnType
from qwenvl_ft.upstream.cache import continues, named

INTERVENTIONS = ("LoreftIntervention", "NoreftIntervention", "ConsreftIntervention")
"""Kinds of edit, with pyreft's names."""

_POSITIONS = re.compile(r"f(?P<first>\d+)(?:\+l(?P<last>\d+))?|l(?P<only>\d+)")


@dataclass
class ReftConfig(OwnConfig):
    """Settings of ReFT."""

    kind = OwnType.REFT

    rank: int = field(default=4)
    """Q, rows of R."""
    intervention: str = field(default="LoreftIntervention")
    """One of ``INTERVENTIONS``."""
    positions: str = field(default="f1+l1")
    """The edited tokens, as ``f1+l1`` or ``all``."""


class Positions:
    """The positions that an adapter edits in the current forward pass; shared by all its layers."""

    def __init__(self, positions: str) -> None:
        self.everywhere = positions == "all"
        self.first, self.last = parse_positions(positions)
        self.index: Tensor | None = None
        """int64[K] into the B * T tokens; None means all of them."""
        self.tokens = -1
        """B * T of the pass that ``index`` belongs to."""

    def follow(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Compute ``index``; a forward pre-hook of the model, because only its inputs show where prompts end."""
        if not self.everywhere:
            inputs = named(model, args, kwargs)
            self.index, self.tokens = edited(inputs, self.first, self.last), math.prod(_tokens_of(inputs).shape[:2])

    def of(self, output: Tensor) -> Tensor | None:
        """Return ``index`` for a layer's output ``[B, T, D]``.

        Raises:
            CheckpointError: the layer runs outside of the model's forward, so ``index`` belongs to another pass.
        """
        if not self.everywhere and math.prod(output.shape[:-1]) != self.tokens:
            raise CheckpointError(
                "ReFT's layers were called without their model's forward, which finds where prompts end. Call the "
                "PeftModel, its base model, or generate of either."
            )
        return self.index


class ReftLayer(OwnLayer):
    """A decoder layer with its edits: ``Q * D`` parameters each for A and W, and Q for b."""

    adapter_layer_names = ("reft_A", "reft_W", "reft_bias")

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.reft_A = nn.ParameterDict()
        self.reft_W = nn.ParameterDict()
        self.reft_bias = nn.ParameterDict()
        self.orthonormal: dict[str, bool] = {}
        self.positions: dict[str, Positions] = {}

    def add(self, adapter_name: str, config: ReftConfig, **context: Any) -> None:
        """Create A, b and W.

        Args:
            context: ``width``, D of the hidden states, and ``positions``, a `Positions`.
        """
        rank, width = config.rank, context["width"]
        start = torch.empty(rank, width)
        nn.init.orthogonal_(start)
        self.orthonormal[adapter_name] = config.intervention != "NoreftIntervention"
        self.positions[adapter_name] = context["positions"]
        self.reft_A[adapter_name] = nn.Parameter(start)
        bias = torch.rand(rank) if config.intervention == "ConsreftIntervention" else torch.zeros(rank)
        self.reft_bias[adapter_name] = nn.Parameter(bias)
        if config.intervention != "ConsreftIntervention":
            self.reft_W[adapter_name] = nn.Parameter(self.basis(adapter_name).detach().clone())

    def basis(self, adapter_name: str) -> Tensor:
        """Return R, float32[Q, D]."""
        stored = self.reft_A[adapter_name].float()
        if not self.orthonormal[adapter_name]:
            return stored
        q, r = torch.linalg.qr(stored.T)
        return (q * r.diagonal().sign()).T

    def changed(self, output: Tensor, adapter_name: str) -> Tensor:
        index = self.positions[adapter_name].of(output)
        if index is not None and index.numel() == 0:
            return output
        flat = output.reshape(-1, output.shape[-1])  # [B * T, D]
        with torch.autocast(output.device.type, enabled=False):
            rotate = self.basis(adapter_name)
            hidden = (flat if index is None else flat.index_select(0, index)).float()  # [K, D]
            target = self.reft_bias[adapter_name].float()
            if adapter_name in self.reft_W:
                target = hidden @ self.reft_W[adapter_name].float().T + target
            edit = ((target - hidden @ rotate.T) @ rotate).to(flat.dtype)
        edited = flat + edit if index is None else flat.index_add(0, index, edit)
        return edited.view_as(output)


class ReftTuner(OwnTuner):
    """The peft tuner of ReFT."""

    prefix = "reft_"
    tuner_layer_cls = ReftLayer

    def add_to(self, layer: OwnLayer, adapter_name: str, config: Any) -> None:
        width = self.model.config.get_text_config().hidden_size
        layer.add(adapter_name, config, width=width, positions=self._positions(adapter_name, config))

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate with the base model.

        The first pass is the prompt, and all later ones are answer: with a key-value cache, the length of the cache
        tells them apart.

        Raises:
            RecipeError: positions count from a prompt's end, but generation would not see where it is: without a
                cache, the last token of each pass is the answer's; with ``prefill_chunk_size``, the prompt comes in
                several passes.
        """
        settings = kwargs.get("generation_config") or self.model.generation_config
        self._require_whole_prompts(
            use_cache=kwargs["use_cache"] if "use_cache" in kwargs else settings.use_cache,
            chunk_size=kwargs.get("prefill_chunk_size") or getattr(settings, "prefill_chunk_size", None),
        )
        return self.model.generate(*args, **kwargs)

    def _require_whole_prompts(self, *, use_cache: bool | None, chunk_size: int | None) -> None:
        active = [self.followed[name] for name in self.active_adapters if name in self.followed]
        if use_cache is False and any(positions.last for positions in active):
            raise RecipeError(
                "use_cache=False: tuner.reft_positions counts from the end of the prompt, and without a cache "
                "generation cannot tell it from the end of the answer. Leave use_cache on."
            )
        if chunk_size and not all(positions.everywhere for positions in active):
            raise RecipeError(
                f"prefill_chunk_size={chunk_size}: tuner.reft_positions needs the whole prompt in one pass, to find "
                "its first and last tokens. Remove prefill_chunk_size."
            )

    def _positions(self, adapter_name: str, config: ReftConfig) -> Positions:
        """Return the positions of an adapter, one object for all layers.

        Created with the first layer, because peft has no call of its own for a new adapter.
        """
        followed: dict[str, Positions] = self.__dict__.setdefault("followed", {})
        if adapter_name not in followed:
            followed[adapter_name] = Positions(config.positions)
            self.model.register_forward_pre_hook(followed[adapter_name].follow, with_kwargs=True)
        return followed[adapter_name]


def parse_positions(positions: str) -> tuple[int, int]:
    """Parse ``f1+l1`` to (1, 1): the number of first tokens of a sample and of last tokens of a prompt.

    ``all`` is (0, 0).

    Raises:
        RecipeError: another form, or no token at all.
    """
    if positions == "all":
        return 0, 0
    match = _POSITIONS.fullmatch(positions)
    first = int(match["first"] or 0) if match else 0
    last = int(match["last"] or match["only"] or 0) if match else 0
    if first + last == 0:
        raise RecipeError(f"tuner.reft_positions={positions!r} names no token. Examples: f1+l1, f7, l3, all.")
    return first, last


def edited(inputs: dict[str, Any], first: int, last: int) -> Tensor:
    """Return the positions to edit in a forward pass, from the model's keyword arguments.

    A prompt ends where an answer begins, which ``labels`` show, or the positions in ``logits_to_keep`` that predict
    one. Without either, as in generation, the whole sample is prompt. If earlier passes have seen tokens, nothing is
    edited: all that follows is answer.

    Returns:
        int64[K], ascending, into the B * T tokens.
    """
    ids = _tokens_of(inputs)
    rows, tokens = ids.shape[:2]
    if continues(inputs):
        return torch.empty(0, dtype=torch.int64, device=ids.device)
    real, begins = _samples(inputs, rows, tokens, ids.device)
    place = torch.arange(tokens, device=ids.device).expand(rows, -1)
    start = torch.where(begins, place, 0).cummax(dim=1).values  # [B, T] where the token's sample begins
    predicts = _predicting(inputs, rows, tokens, ids.device)
    if predicts is None:
        ends = real & ~(real & ~begins).roll(-1, 1)
        ends[:, -1] = real[:, -1]
        answer = torch.zeros_like(real)
    else:
        answer = torch.nn.functional.pad(predicts[:, :-1], (1, 0))
        ends = predicts & ~answer
    after = torch.where(ends, place, tokens).flip(1).cummin(dim=1).values.flip(1)  # [B, T] where its prompt ends
    same = start.gather(1, after.clamp(max=tokens - 1)) == start
    chosen = (place - start < first) | ((after - place < last) & same)
    return (chosen & real & ~answer).flatten().nonzero(as_tuple=True)[0]


def _tokens_of(inputs: dict[str, Any]) -> Tensor:
    """Return ``input_ids`` int64[B, T] or ``inputs_embeds`` float[B, T, D], whichever the model is called with."""
    tensor: Tensor = next(inputs[key] for key in ("input_ids", "inputs_embeds") if inputs.get(key) is not None)
    return tensor


def _samples(inputs: dict[str, Any], rows: int, tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return two bool[B, T]: True for tokens other than padding, and True for the first token of each sample."""
    mask = inputs["attention_mask"] if "attention_mask" in inputs else None
    if mask is not None and mask.ndim == 2:
        real = mask.bool()
        return real, real & ~torch.nn.functional.pad(real[:, :-1], (1, 0))
    real = torch.ones(rows, tokens, dtype=torch.bool, device=device)
    begins = torch.zeros_like(real)
    begins[:, 0] = True
    positions = inputs["position_ids"] if "position_ids" in inputs else None
    borders = inputs["cu_seq_lens_q"] if "cu_seq_lens_q" in inputs else None
    if borders is not None:
        begins.view(-1)[borders[:-1].long()] = True
    elif positions is not None and positions.ndim == 3 and positions.shape[0] == 4:
        begins[:, 1:] = positions[0].expand(rows, -1).diff() != 1
    return real, begins


def _predicting(inputs: dict[str, Any], rows: int, tokens: int, device: torch.device) -> Tensor | None:
    """Return bool[B, T], True where the next token is supervised; None if the inputs do not show it."""
    labels = inputs["labels"] if "labels" in inputs else None
    if labels is not None:
        return torch.nn.functional.pad(labels[:, 1:] != IGNORE, (0, 1))
    keep = next((inputs[name] for name in ("predicting", "logits_to_keep") if name in inputs), None)
    if not isinstance(keep, Tensor):
        return None
    if keep.dtype == torch.bool:
        return keep
    predicts = torch.zeros(rows, tokens, dtype=torch.bool, device=device)
    predicts[:, keep] = True
    return predicts
