"""How fast records become batches, per core, beside the least that any loader must do: decode and resize the images."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from qwenvl_ft.bench.workload import write_records
from qwenvl_ft.data.collate import QwenVLCollator
from qwenvl_ft.data.conversation import Image
from qwenvl_ft.data.encode.encoder import Encoder
from qwenvl_ft.data.media.images import open_image
from qwenvl_ft.data.media.patches import obstacle, resized, stored
from qwenvl_ft.data.plan.lengths import measure
from qwenvl_ft.data.plan.packing import RunShape, assign, fill, pack_lengths
from qwenvl_ft.data.readers import read_record
from qwenvl_ft.data.sources.records import load_records
from qwenvl_ft.errors import DataError
from qwenvl_ft.model.placed_media import MediaPlaces
from qwenvl_ft.upstream.media import frame_tables

TABLE_SIDE = 48
"""Rows of the learned position table of every released Qwen3-VL."""
TURN = 8
"""Records that the floor, then the encoder, takes in its turn, so that noise of the machine hits both alike."""


@dataclass
class DataResult:
    """Seconds are of one core (processor time), so that other work of the machine does not count."""

    records: int
    images: int
    tokens: int
    open_seconds: float
    """Files -> records that can be indexed, nothing cached."""
    plan_seconds: float
    """Lengths of all records, nothing cached."""
    plan_again_seconds: float
    """The same with the cache of the first time."""
    pack_seconds: float
    """Lengths -> rows, dealt out."""
    fill: float
    """Share of the rows' places that hold a token."""
    encode_seconds: float
    """Records -> batches: read, decode, resize, cut into patches, tokenise, join."""
    floor_seconds: float
    """The same images decoded and resized, and nothing else."""
    bytes_per_image: float
    """Of pixels in a batch."""
    processor_bytes_per_image: float
    """What the processor would have made of them."""

    def told(self) -> dict[str, Any]:
        """As JSON, with what follows."""
        return asdict(self) | {
            "planned_per_second": round(self.records / self.plan_seconds, 1),
            "samples_per_second": round(self.records / self.encode_seconds, 1),
            "times_floor": round(self.encode_seconds / self.floor_seconds, 3) if self.floor_seconds else None,
        }


def bench_data(
    processor: Any,
    file: Path | None = None,
    *,
    media_root: str | None = None,
    records: int = 200,
    row_length: int = 4096,
) -> DataResult:
    """Measure the way of records into rows, in this process, on one thread.

    Args:
        file: records of any format; None makes photos and questions.
        records: so many of them are encoded, and made if there is no file; all of the file are planned.

    Raises:
        DataError: a record or a medium cannot be read, or there is no image to compare with.
    """
    with TemporaryDirectory() as name, _one_thread():
        folder = Path(name)
        path = file or write_records(folder / "data", records=records, images=min(records, 40))
        encoder = Encoder(processor, max_length=row_length, truncation_strategy="delete")
        encoder.raw_pixels = not obstacle(processor.image_processor)
        opening = partial(load_records, str(path), media_root=media_root, cache_dir=folder / "arrow")
        open_seconds, source = _cpu(opening)
        plan, lengths = _cpu(partial(measure, source, encoder, cache_dir=folder / "lengths"))
        again, _ = _cpu(partial(measure, source, encoder, cache_dir=folder / "lengths"))
        kept = lengths.kept
        tokens = lengths.tokens[kept]
        pack, rows = _cpu(partial(pack_lengths, tokens, max_length=row_length))
        deal, _ = _cpu(partial(assign, rows, tokens, RunShape(8, 1, 4)))
        conversations = [read_record(*source[int(i)]) for i in kept[:records]]
        images = [[part.value for part in conversation.media(Image)] for conversation in conversations]
        told = [source[int(i)] for i in kept[:records]]
        encode, floor, size = _in_turns(told, images, encoder)
        count = sum(map(len, images))
        if not count:
            raise DataError(f"{path}: no record has an image, so there is nothing to compare with.")
        return DataResult(
            records=len(told),
            images=count,
            tokens=int(tokens[: len(told)].sum()),
            open_seconds=open_seconds,
            plan_seconds=plan * len(told) / len(source),
            plan_again_seconds=again * len(told) / len(source),
            pack_seconds=pack + deal,
            fill=fill(rows, tokens, row_length),
            encode_seconds=encode,
            floor_seconds=floor,
            bytes_per_image=size / count,
            processor_bytes_per_image=_processor_bytes(images, encoder) / count,
        )


def _in_turns(told: list[Any], images: list[list[Any]], encoder: Encoder) -> tuple[float, float, int]:
    """Seconds of encoding and of the floor, bytes of pixels."""
    own = encoder.processor
    places = MediaPlaces(
        (own.image_token_id, own.video_token_id), frame_tables(own.image_processor.merge_size, TABLE_SIDE)
    )
    collator, size = QwenVLCollator(places=places), 0
    encode = floor = 0.0
    _encoded(told[:TURN], encoder, collator)  # what is made once
    _floor(images[:TURN], encoder)
    for begin in range(0, len(told), TURN):
        part = slice(begin, begin + TURN)
        floor += _cpu(partial(_floor, images[part], encoder))[0]
        seconds, batch = _cpu(partial(_encoded, told[part], encoder, collator))
        encode += seconds
        size += sum(value.nbytes for name, value in batch.items() if name.startswith("pixel_"))
    return encode, floor, size


def _processor_bytes(images: list[list[Any]], encoder: Encoder) -> int:
    """Of the pixels that the image processor would hand over."""
    own = encoder.processor.image_processor
    opened = (open_image(value, encoder.policy) for of_record in images for value in of_record)
    return sum(own(images=[image], return_tensors="pt")["pixel_values"].nbytes for image in opened)


def _encoded(told: list[Any], encoder: Encoder, collator: QwenVLCollator) -> dict[str, Any]:
    return collator([encoder(read_record(*record)) for record in told])


def _floor(images: list[list[Any]], encoder: Encoder) -> None:
    """Decode and resize, as the encoder does and to the same size, and nothing else."""
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    own = encoder.processor.image_processor
    factor = own.patch_size * own.merge_size
    areas = {"min_pixels": own.size.shortest_edge, "max_pixels": own.size.longest_edge}
    for value in (value for of_record in images for value in of_record):
        image = open_image(value, encoder.policy)
        height, width = smart_resize(image.height, image.width, factor=factor, **areas)
        resized(stored(image).permute(2, 0, 1), height, width, own)


def _cpu(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of this process's cores, and what came of it."""
    begin = time.process_time()
    result = work()
    return max(time.process_time() - begin, 1e-9), result


@contextmanager
def _one_thread() -> Iterator[None]:
    threads, told = torch.get_num_threads(), os.environ.get("TOKENIZERS_PARALLELISM")
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        if told is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = told
