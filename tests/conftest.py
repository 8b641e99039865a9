"""Fixtures: tiny checkpoints of the real Qwen3-VL classes, created once per session, and records of every kind."""

import json
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from cases import KINDS, OLDER_KINDS, make_kind, picture
from filelock import FileLock

torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    """Skip tests marked gpu without a CUDA device."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="there is no CUDA device"))


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Keep the session's Arrow files and length caches out of the user's."""
    import datasets

    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("hf_datasets")


@pytest.fixture(autouse=True)
def no_launcher():
    """Remove the launcher variables that DeepSpeed sets in this process, so that they do not affect later tests."""
    before = dict(os.environ)
    yield
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        if name not in before:
            os.environ.pop(name, None)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """Map each of ``KINDS`` and ``OLDER_KINDS`` to the directory of a tiny checkpoint."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if os.environ.get("PYTEST_XDIST_WORKER") else root
    with FileLock(root / "tiny.lock"):
        folders = {kind: root / f"tiny-{kind}" for kind in (*KINDS, *OLDER_KINDS)}
        for kind, folder in folders.items():
            if not (folder / "done").exists():
                make_kind(folder, kind)
                (folder / "done").touch()
    return folders


@pytest.fixture(scope="session")
def tiny_dir(checkpoints):
    return checkpoints["dense"]


@pytest.fixture(scope="session")
def processor(tiny_dir):
    from qwenvl_ft.model.load import load_processor

    return load_processor(str(tiny_dir))


@pytest.fixture(scope="session")
def encoder(processor):
    from qwenvl_ft.data.encode.encoder import Encoder

    return Encoder(processor)


@pytest.fixture(params=KINDS)
def any_model(request, checkpoints):
    """A new float32 model of each architecture, in eval mode."""
    from qwenvl_ft.model.load import load_model

    return load_model(str(checkpoints[request.param]), torch_dtype="float32", attn_impl="sdpa").eval()


@pytest.fixture
def tiny_model(tiny_dir):
    """A new float32 dense model, in eval mode."""
    from qwenvl_ft.model.load import load_model

    return load_model(str(tiny_dir), torch_dtype="float32", attn_impl="sdpa").eval()


@pytest.fixture(scope="session")
def mixed_records():
    """Records with one image, several images, a video, text only, several turns, and a system prompt."""
    a, b, c = picture(96, 64), picture(64, 128, 1), picture(50, 70, 2)
    frames = [picture(64, 64, seed) for seed in range(5)]
    turn = lambda role, text: {"from": role, "value": text}  # noqa: E731
    return [
        {"image": [a], "conversations": [turn("human", "<image>\nWhat is it?"), turn("gpt", "A blur.")]},
        {"conversations": [turn("human", "Say hello."), turn("gpt", "Hello, hello there.")]},
        {
            "image": [b, c],
            "conversations": [
                turn("human", "<image>\n<image>\nSame?"),
                turn("gpt", "No."),
                turn("human", "Why does the assistant think so?"),
                turn("gpt", "Colours differ.\nSizes too."),
            ],
        },
        {"video": [frames], "conversations": [turn("human", "<video>\nWhat moves?"), turn("gpt", "Everything.")]},
        {
            "image": c,
            "video": [frames[:4]],
            "conversations": [
                turn("system", "Be brief."),
                turn("human", "First <image> then <video> compare."),
                turn("gpt", "ok"),
            ],
        },
    ]


@pytest.fixture
def write_jsonl(tmp_path):
    """Write records as a .jsonl file and return its path."""

    def write(records, name="data.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
        return path

    return write
