"""Measures the data path per core, beside the least that any loader must do: decode and resize the images."""

import gc
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
from qwenvl_ft.upstream.vision_tables import frame_tables

TABLE_SIDE = 48
"""Side of the learned position table of every released Qwen3-VL."""
TURN = 8
"""Records per turn; floor and encoder alternate, so that noise of the machine affects both equally."""


@dataclass
class DataResult:
    """Result of the measurement. Seconds are CPU time of one core, so that other work on the machine does not count."""

    records: int
    images: int
    tokens: int
    open_seconds: float
    """From files to indexable records, without a cache."""
    plan_seconds: float
    """Measuring the lengths of all records, without a cache."""
    plan_again_seconds: float
    """The same with the cache of the first run."""
    pack_seconds: float
    """From lengths to rows, distributed over ranks."""
    fill: float
    """Share of the rows' capacity that holds tokens, 0 to 1."""
    encode_seconds: float
    """From records to batches: read, decode, resize, cut into patches, tokenise, collate."""
    floor_seconds: float
    """Decoding and resizing the same images, and nothing else."""
    bytes_per_image: float
    """Bytes of pixels per image in a batch."""
    processor_bytes_per_image: float
    """Bytes of pixels per image that the processor would produce."""

    def to_json(self) -> dict[str, Any]:
        """Return the result and derived rates as a dict that JSON can hold."""
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
    """Measure the data path from records to rows, in this process, on one thread.

    Args:
        file: records of any format; None generates photos and questions.
        records: number of records to encode, and to generate without a file; all records of a file are planned.

    Raises:
        DataError: a record or a medium cannot be read, or no record has an image.
    """
    with TemporaryDirectory() as name, _one_thread(), _imports_frozen():
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
        chosen = [source[int(i)] for i in kept[:records]]
        encode, floor, size = _in_turns(chosen, images, encoder)
        count = sum(map(len, images))
        if not count:
            raise DataError(f"{path}: no record has an image, so there is nothing to compare with.")
        return DataResult(
            records=len(chosen),
            images=count,
            tokens=int(tokens[: len(chosen)].sum()),
            open_seconds=open_seconds,
            plan_seconds=plan * len(chosen) / len(source),
            plan_again_seconds=again * len(chosen) / len(source),
            pack_seconds=pack + deal,
            fill=fill(rows, tokens, row_length),
            encode_seconds=encode,
            floor_seconds=floor,
            bytes_per_image=size / count,
            processor_bytes_per_image=_processor_bytes(images, encoder) / count,
        )


def _in_turns(records: list[Any], images: list[list[Any]], encoder: Encoder) -> tuple[float, float, int]:
    """Return seconds of encoding and of the floor, and bytes of pixels."""
    processor = encoder.processor
    places = MediaPlaces(
        (processor.image_token_id, processor.video_token_id),
        frame_tables(processor.image_processor.merge_size, TABLE_SIDE),
    )
    collator, size = QwenVLCollator(places=places), 0
    encode = floor = 0.0
    _encoded(records[:TURN], encoder, collator)  # warm-up
    _floor(images[:TURN], encoder)
    for begin in range(0, len(records), TURN):
        part = slice(begin, begin + TURN)
        floor += _cpu(partial(_floor, images[part], encoder))[0]
        seconds, batch = _cpu(partial(_encoded, records[part], encoder, collator))
        encode += seconds
        size += sum(value.nbytes for name, value in batch.items() if name.startswith("pixel_"))
    return encode, floor, size


def _processor_bytes(images: list[list[Any]], encoder: Encoder) -> int:
    """Return the bytes of pixels that the image processor produces."""
    processor = encoder.processor.image_processor
    opened = (open_image(value, encoder.policy) for of_record in images for value in of_record)
    return sum(processor(images=[image], return_tensors="pt")["pixel_values"].nbytes for image in opened)


def _encoded(records: list[Any], encoder: Encoder, collator: QwenVLCollator) -> dict[str, Any]:
    return collator([encoder(read_record(*record)) for record in records])


def _floor(images: list[list[Any]], encoder: Encoder) -> None:
    """Decode images and resize them to the encoder's sizes, and nothing else."""
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    processor = encoder.processor.image_processor
    factor = processor.patch_size * processor.merge_size
    areas = {"min_pixels": processor.size.shortest_edge, "max_pixels": processor.size.longest_edge}
    for value in (value for of_record in images for value in of_record):
        image = open_image(value, encoder.policy)
        height, width = smart_resize(image.height, image.width, factor=factor, **areas)
        resized(stored(image).permute(2, 0, 1), height, width, processor)


def _cpu(work: Callable[[], Any]) -> tuple[float, Any]:
    """Run ``work``; return its CPU seconds in this process, and its result."""
    begin = time.process_time()
    result = work()
    return max(time.process_time() - begin, 1e-9), result


@contextmanager
def _one_thread() -> Iterator[None]:
    threads, parallelism = torch.get_num_threads(), os.environ.get("TOKENIZERS_PARALLELISM")
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        if parallelism is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = parallelism


@contextmanager
def _imports_frozen() -> Iterator[None]:
    """Keep the garbage collector away from all objects that exist already: one full pass over the imported libraries
    takes 0.3 s, ten times as long as planning 160 records."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
