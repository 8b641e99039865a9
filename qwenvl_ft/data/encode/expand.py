"""Expands a draft to the tensors of its sample, all but the pixels.

Letters in shapes: L tokens, N images or videos.
"""

import numpy as np
import torch

from qwenvl_ft.data.conversation import Sample
from qwenvl_ft.data.encode.draft import Draft
from qwenvl_ft.data.encode.labels import expand_labels
from qwenvl_ft.data.encode.rope import mrope_positions


def expand(draft: Draft) -> Sample:
    """Return ``input_ids``, ``labels`` int64[L], ``position_ids`` int64[3, L] and ``source`` of a draft.

    With weights of turns also ``label_weights`` float64[L], with media their grids int64[N, 3].
    """
    ids = np.repeat(draft.ids, draft.counts)
    sample: Sample = {
        "input_ids": torch.from_numpy(ids),
        "labels": torch.from_numpy(expand_labels(ids, draft.supervised, draft.counts)),
        "position_ids": torch.from_numpy(mrope_positions(draft.counts, draft.widths)),
        "source": draft.source,
    }
    if draft.weights is not None:
        sample["label_weights"] = torch.from_numpy(np.repeat(draft.weights, draft.counts))
    if draft.images:
        sample["image_grid_thw"] = torch.tensor(draft.image_grids)
    if draft.videos:
        sample["video_grid_thw"] = torch.tensor(draft.video_grids)
    return sample
