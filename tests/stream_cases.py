"""Shards of a stream, and a web server that hands them out, for tests."""

import io
import json
import tarfile
import threading
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pyarrow as pa
import pyarrow.parquet as pq
from cases import picture
from run_cases import short_run

from qwenvl_ft.data.sources.key_rules import ALL_KEYS


def image_bytes(number, width=64):
    buffer = io.BytesIO()
    picture(width, 64, number).save(buffer, "PNG")
    return buffer.getvalue()


def turns(number, *, images=1, longest=3):
    """Return the turns of a record; their lengths differ from number to number."""
    answer = f"it is {number} " * (1 + number % longest)
    return [{"from": "human", "value": "<image>\n" * images + "What?"}, {"from": "gpt", "value": answer}]


def write_tar(path, numbers, *, text=False):
    """Write a webdataset shard: ``000001.json`` and ``000001.png``; every third record has two images."""
    with tarfile.open(path, "w") as tar:
        for number in numbers:
            images = 0 if text else 1 + (number % 3 == 0)
            record = {"id": f"r{number}", "conversations": turns(number, images=images)}
            members = [("json", json.dumps(record).encode())]
            members += [(f"{k}.png" if images > 1 else "png", image_bytes(number, 64 * (1 + k))) for k in range(images)]
            for ending, content in members:
                entry = tarfile.TarInfo(f"{number:06d}.{ending}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    return path


def write_parquet(path, numbers):
    """Write a shard of columns; images are structs, as the Image feature of `datasets` writes them."""
    records = [
        {
            "id": f"r{number}",
            "conversations": turns(number),
            "image": {"bytes": image_bytes(number), "path": f"{number}.png"},
        }
        for number in numbers
    ]
    pq.write_table(pa.Table.from_pylist(records), path)
    return path


def write_jsonl(path, numbers):
    lines = [json.dumps({"id": f"r{n}", "conversations": turns(n, images=0)}) for n in numbers]
    path.write_text("\n".join(lines) + "\n")
    return path


def write_shards(folder, shards=4, records=7, write=write_tar, ending="tar"):
    """Write shards of unequal sizes; return their names. Record numbers go on from shard to shard."""
    folder.mkdir(parents=True, exist_ok=True)
    names, first = [], 0
    for k in range(shards):
        count = records + k % 3
        names.append(write(folder / f"{k:03d}.{ending}", range(first, first + count)).name)
        first += count
    return names


class Served(ThreadingHTTPServer):
    """A web server over a folder; counts the requests for each file."""

    daemon_threads = True

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.requests = Counter()
        self.failing = Counter()
        """File -> number of requests that will still break off half-way."""
        self.gone = set()

    def url(self, name=""):
        return f"http://127.0.0.1:{self.server_port}/{name}"


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        name = self.path.partition("?")[0].lstrip("/")
        self.server.requests[name] += 1
        path = self.server.folder / name
        if name in self.server.gone or not path.is_file():
            self.send_error(404)
            return
        content = path.read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.server.failing[name]:
            self.server.failing[name] -= 1
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True
            return
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@contextmanager
def served(folder):
    """Serve a folder over http inside the context."""
    server = Served(folder)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


WINDOW = 5
"""Records of a window."""
LOADING = {"media_root": None, "media_outside_root": None, "rules": ALL_KEYS, "max_record_bytes": 16_000_000}


def open_stream(selection, folder, encoder, *, window=WINDOW, rounds=2, saved=None, skip=False, seed=3, **options):
    """Open a stream as a run without reading ahead does."""
    from qwenvl_ft.data.plan.epochs import RecordEpochs
    from qwenvl_ft.data.plan.windows import Saved, StreamOptions, WindowDataset, Windows
    from qwenvl_ft.data.sources.shards import list_shards
    from qwenvl_ft.data.sources.stream import Stream

    stream = Stream(window, folder, LOADING | {"seed": seed, "skip": skip})
    part = StreamOptions(folder, lambda: list_shards(selection), rounds, reads_ahead=False, saved=saved or Saved())
    windows = Windows(stream, RecordEpochs, part)
    return WindowDataset(windows, encoder, on_error="skip" if skip else "raise", **options)


def stream_run(model, data, output, *more):
    """Return the overrides of a short run over a stream, with dropout, in packed rows."""
    return short_run(
        model,
        data,
        output,
        "data.streaming=true",
        "data.stream_window=8",
        f"data.stream_cache={output}-cache",
        "template.max_length=160",
        "tuner.train_type=lora",
        "tuner.lora_dropout=0.1",
        "tuner.freeze_vit=false",
        "training.learning_rate=1e-2",
        "training.activation_checkpointing=false",
        "training.gradient_accumulation_steps=2",
        "training.max_steps=14",
        "training.logging_steps=1",
        *more,
    )
