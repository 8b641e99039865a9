"""NEFTune over packed rows: each sample gets the noise that it would get alone."""

from typing import Any

import torch
from torch import Tensor, nn

from qwenvl_ft.model.sequence_parallel import SequenceGroup


class SampleNoise:
    """Forward hook of the token embedding that adds uniform noise up to ``alpha / sqrt(L * D)`` in training.

    L is the length of the token's own sample, D the width of the embedding. transformers' hook takes the row's length
    instead, so its noise weakens with the number of samples in a row.

    Source: arXiv 2310.05914, section 3.
    """

    def __init__(self, alpha: float) -> None:
        self.alpha = alpha
        self.lengths = torch.ones(1, 1)

    @classmethod
    def of(cls, model: Any, alpha: float) -> "SampleNoise":
        """Hook the token embedding of a model."""
        noise = cls(alpha)
        model.get_input_embeddings().register_forward_hook(noise)
        return noise

    def follow(self, batch: dict[str, Any], group: SequenceGroup | None = None) -> None:
        """Set the sample lengths from the next batch: one flat row, or this rank's part of it, or padded rows."""
        if "attention_mask" in batch:
            self.lengths = batch["attention_mask"].sum(dim=1, keepdim=True)  # [S, 1]
        else:
            sizes = batch["cu_seq_lens_q"].diff().long()
            self.lengths = sizes.repeat_interleave(sizes)[None]  # [1, T]
            if group is not None:
                self.lengths = self.lengths[:, group.part(self.lengths.shape[1])]

    def __call__(self, module: nn.Module, arguments: Any, output: Tensor) -> Tensor | None:
        if not module.training:
            return None
        strength = self.alpha / (self.lengths * output.shape[-1]).sqrt()[..., None]
        noise = torch.empty_like(output).uniform_(-1, 1)
        return output + noise * strength.to(output.device, output.dtype, non_blocking=True)
