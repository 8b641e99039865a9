"""Measures the memory and the disk that planning a stream takes, for numbers of records that differ by ten.

    PYTHONPATH=. python tests/stream_memory.py --write    # write the table in docs/streaming.md

Each number of records has a process of its own. It reads shards from a web server, window by window, measures and plans
them as a run of two ranks does, and makes one sample of each window.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
from marked_pages import write_between
from stream_cases import open_stream, served, write_jsonl

COUNTS, SHARD, WINDOW = (10_000, 100_000), 1_000, 2_000
PAGE = Path(__file__).resolve().parents[1] / "docs" / "streaming.md"
BEGIN, END = "<!-- by tests/stream_memory.py -->", "<!-- end -->"
HEADER = "| records | windows | memory after the first window, MiB | at the end | most | most disk, MiB |"
RULE = "|---" * 6 + "|"


def read_all(model: str, url: str, folder: Path) -> dict[str, float]:
    """Read and plan a stream to its end; sizes in MiB."""
    from qwenvl_ft.data.encode.encoder import Encoder
    from qwenvl_ft.data.plan.packing import RunShape
    from qwenvl_ft.data.plan.sampler import PlanSampler
    from qwenvl_ft.model.load import load_processor

    process = psutil.Process()
    dataset = open_stream(url, folder, Encoder(load_processor(model)), window=WINDOW, rounds=1)
    plan = PlanSampler(dataset, RunShape(data_ranks=2, accumulation=2), max_length=512)
    first, window, records, disk = 0.0, 0, 0, 0.0
    while len(dataset.at(window)):
        plan.set_epoch(window)
        batches = list(plan)
        assert len(dataset[batches[0][0]]["input_ids"])
        records += len(dataset)
        disk = max(disk, sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**20)
        first = first or process.memory_info().rss / 2**20
        window += 1
    return {
        "records": records,
        "windows": window,
        "first": first,
        "last": process.memory_info().rss / 2**20,
        "most": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10,
        "disk": disk,
    }


def measured(model: Path, count: int, shard: int = SHARD) -> dict[str, float]:
    """Return what `read_all` finds for a number of records, in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="qwenvl-ft-stream-") as name:
        folder, shards = Path(name), count // shard
        for k in range(shards):
            (folder / "web").mkdir(exist_ok=True)
            write_jsonl(folder / "web" / f"{k:05d}.jsonl", range(k * shard, (k + 1) * shard))
        with served(folder / "web") as server:
            url = server.url(f"{{00000..{shards - 1:05d}}}.jsonl")
            words = [sys.executable, __file__, "--read", str(model), url, str(folder / "cache")]
            done = subprocess.run(words, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def table(rows: list[dict[str, float]]) -> str:
    lines = [HEADER, RULE]
    for row in rows:
        sizes = " | ".join(f"{row[key]:.0f}" for key in ("first", "last", "most"))
        lines.append(f"| {row['records']:,} | {row['windows']} | {sizes} | {row['disk']:.1f} |")
    return "\n".join(lines)


def main() -> None:
    from qwenvl_ft.model.tiny import make_tiny

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"write the table into docs/{PAGE.name}")
    parser.add_argument("--read", nargs=3, metavar=("MODEL", "URL", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.read:
        model, url, folder = arguments.read
        print(json.dumps(read_all(model, url, Path(folder))))
        return
    with tempfile.TemporaryDirectory() as name:
        model = make_tiny(Path(name) / "tiny")
        rows = [measured(model, count) for count in COUNTS]
    print(table(rows))
    if arguments.write:
        write_between(PAGE, BEGIN, END, table(rows))


if __name__ == "__main__":
    main()
