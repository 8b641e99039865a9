"""Rows of text, images and videos, the part of each that a rank gets, and a model for them: for shared rows."""

import torch
import torch.distributed as dist
from cases import picture

from qwenvl_ft.data.collate import QwenVLCollator, vision_fillers
from qwenvl_ft.data.plan.costs import CostModel
from qwenvl_ft.data.share import Share
from qwenvl_ft.model.load import load_model
from qwenvl_ft.model.placed_media import MediaPlaces
from qwenvl_ft.model.sequence_parallel import SequenceGroup, exchange_heads
from qwenvl_ft.training.device_batch import on_device
from qwenvl_ft.training.loss import loss_sum

CPU = torch.device("cpu")
EXACT = 1e-6
"""Largest relative difference. The models are float64, but their norms compute in float32."""
MERGED = 4
"""Patches of a merged token."""
PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}


def turn(question, answer):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def text(words):
    return {"conversations": turn("Say " * words, "word " * (1 + words % 5))}


def images(*widths):
    media = [picture(width, 64, width) for width in widths]
    return {"image": media, "conversations": turn("<image>\n" * len(media) + "Which?", "the first " * len(media))}


def video(frames):
    media = [picture(64, 96, seed) for seed in range(frames)]
    return {"video": [media], "conversations": turn("<video>\nWhat moves?", "Everything that can.")}


ROWS = {
    "text, images and a video": [text(3), images(64, 128), video(6), text(9), images(96)],
    "one image": [text(11), images(160), text(2)],
    "text alone": [text(4), text(13), text(1)],
    "one long sample": [images(64, 96, 128, 64)],
    "two videos": [video(4), text(1), video(9)],
}


def whole_row(encoder, records, places=None, lengthen=0):
    """Join records into the row of one process; ``lengthen`` moves all borders behind the first sample."""
    first = dict(records[0])
    first["conversations"] = [dict(entry) for entry in first["conversations"]]
    first["conversations"][-1]["value"] += " more" * lengthen
    samples = [encoder(record) for record in [first, *records[1:]]]
    kinds = ("image", "video") if any("pixel_values_videos" in sample for sample in samples) else ("image",)
    return QwenVLCollator(vision_fillers(encoder.processor, kinds), places)(samples)


def padded(batch, size):
    """Append a pseudo-sample of padding, so that the tokens can be divided by ``size``."""
    tokens = batch["input_ids"].shape[1]
    more = -tokens % size
    if not more:
        return dict(batch)
    grown = dict(batch)
    grown["input_ids"] = torch.nn.functional.pad(batch["input_ids"], (0, more))
    grown["labels"] = torch.nn.functional.pad(batch["labels"], (0, more), value=-100)
    if "label_weights" in batch:
        grown["label_weights"] = torch.nn.functional.pad(batch["label_weights"], (0, more), value=1)
    own = torch.arange(more).expand(4, 1, more)
    grown["position_ids"] = torch.cat([batch["position_ids"], own], dim=2)
    borders = torch.cat([batch["cu_seq_lens_q"], torch.tensor([tokens + more], dtype=torch.int32)])
    grown["cu_seq_lens_q"] = grown["cu_seq_lens_k"] = borders
    return grown


def shared_row(batch, size, place):
    """Return what a rank gets: the padded row with the pixels of the frames that are dealt to it."""
    part = padded(batch, size)
    share = Share(size, place, 0, CostModel())
    for kind, pixels in PIXELS.items():
        if pixels not in part:
            continue
        frames = [(1, h, w) for t, h, w in part[f"{kind}_grid_thw"].tolist() for _ in range(t)]
        patches = torch.tensor([h * w for _, h, w in frames])
        owners = torch.from_numpy(share.deal(patches.tolist()))
        tables = [name for name in part if name.startswith((f"{kind}_position", f"{kind}_interp"))]
        chosen = (owners == place).nonzero().flatten().tolist() or [0]  # without a frame: one that nobody needs
        for name in (pixels, *tables):
            pieces = part[name].split(patches.tolist())
            part[name] = torch.cat([pieces[i] for i in chosen])
        part[f"{kind}_grid_thw"] = torch.tensor([frames[i] for i in chosen])
        own = patches[chosen]
        part[f"{kind}_cu_seqlens"] = torch.nn.functional.pad(own.cumsum(0), (1, 0)).to(torch.int32)
        part[f"{kind}_max_seqlen"] = int(own.max())
        part[f"{kind}_owners"], part[f"{kind}_tokens"] = owners, patches // MERGED
    return part


def model_of(checkpoint):
    """Return a float64 model with packed attention, and its `MediaPlaces`."""
    model = in_float64(load_model(str(checkpoint), torch_dtype="float32", attn_impl="packed_sdpa"))
    return model, MediaPlaces.of(model)


def in_float64(model):
    """Convert a model; grouped products of experts have no kernel for float64."""
    model.set_experts_implementation("eager")
    return model.double()


def results(model, row, group=None, **options):
    """Return the summed loss of a row, or of this rank's part of it, and the gradients by name."""
    model.zero_grad()
    total = loss_sum(model, on_device(row, CPU, {}, group), **options)
    total.backward()
    return total.detach(), {name: value.grad for name, value in model.named_parameters() if value.requires_grad}


def difference(model, row, size, group, **options):
    """Return the relative difference of a shared row's loss and gradients from those of the whole row."""
    loss, whole = results(model, row, **options)
    own, parts = results(model, shared_row(row, size, group.place), group, **options)
    dist.all_reduce(own)
    worst = abs(float(own - loss)) / abs(float(loss))
    for name, gradient in whole.items():
        expected = torch.zeros(()) if gradient is None else gradient
        found = torch.zeros_like(expected) if parts[name] is None else parts[name]
        dist.all_reduce(found)
        worst = max(worst, float((found - expected).abs().max()) / max(float(expected.abs().max()), 1e-12))
    return worst


def over_rows(encoder, model, places, rows, lengths, **options):
    """Run by each rank: return the differences by row and by what was added to its first sample."""
    group = SequenceGroup.of(dist.get_world_size())
    exchange_heads(model.config.get_text_config())
    model.train()
    found = {}
    for name in rows:
        for length in lengths:
            row = whole_row(encoder, ROWS[name], places, length)
            found[name, length] = difference(model, row, group.size, group, **options)
    return found


def assert_exact(found):
    assert found
    wrong = {row: value for differences in found for row, value in differences.items() if not value <= EXACT}
    assert wrong == {}
