"""Tests each training method on tiny models and writes the table in docs/tuning.md.

    make methods                                    # run all rows and write them into the guide (minutes on 2 cores)
    python tests/methods_table.py [NAME ...]        # run some rows and print them

`tried` runs one method on one architecture and returns the text of each column; no cell is written by hand.
"""

import copy
import os
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path

import torch
import yaml
from cases import FOR_4_BITS, ListRecords, make_kind, picture, quiet_arguments
from methods_cases import BASES, CASES, COLUMNS, FAMILIES, KINDS, Case, tuner_of
from methods_shipped import check_shipped
from peft import PeftModel
from transformers import PrinterCallback

from qwenvl_ft.assemble import start_batches
from qwenvl_ft.data.collate import QwenVLCollator
from qwenvl_ft.data.encode.encoder import Encoder
from qwenvl_ft.data.plan.dataset import SampleDataset
from qwenvl_ft.errors import CheckpointError, RecipeError, one_line
from qwenvl_ft.export.merge import merge
from qwenvl_ft.model.adapters import register_adapters
from qwenvl_ft.model.load import load_model, load_processor
from qwenvl_ft.recipe.schema import QuantizationConfig
from qwenvl_ft.training.callbacks.lisa import LisaCallback
from qwenvl_ft.training.loss import loss_sum, split_labels
from qwenvl_ft.training.trainer import QwenVLTrainer
from qwenvl_ft.tuning.methods.starts import wants_data
from qwenvl_ft.tuning.optimizer import param_groups
from qwenvl_ft.tuning.prepare import prepare_model

GUIDE = Path(__file__).resolve().parents[1] / "docs" / "tuning.md"
BEGIN, END = "<!-- by make methods -->", "<!-- end -->"
"""Markers around the table in the guide."""


# -- models and data ---------------------------------------------------------------------------------------------------


@cache
def checkpoint(kind: str) -> Path:
    folder = Path(tempfile.gettempdir()) / f"qwenvl-ft-methods-{os.getpid()}" / kind
    return make_kind(folder, kind, **FOR_4_BITS)


@cache
def base_model(kind: str, bits: str = "whole"):
    quantization = QuantizationConfig(**BASES[bits]) if BASES[bits] else None
    return load_model(str(checkpoint(kind)), torch_dtype="float32", attn_impl="sdpa", quantization=quantization).eval()


@cache
def encoder() -> Encoder:
    return Encoder(load_processor(str(checkpoint("dense"))))


@cache
def digits() -> SampleDataset:
    """48 handwritten digits of scikit-learn, drawn at 64 x 64."""
    from PIL import Image
    from sklearn.datasets import load_digits

    data = load_digits()
    records = [
        {
            "image": [Image.fromarray((ink * 15.9).astype("uint8")).resize((64, 64)).convert("RGB")],
            "conversations": [
                {"from": "human", "value": "<image>\nWhich digit is this?"},
                {"from": "gpt", "value": str(digit)},
            ],
        }
        for ink, digit in zip(data.images[:48], data.target[:48], strict=True)
    ]
    return Encoded(ListRecords(records, "digits"), encoder(), cache_dir=checkpoint("dense") / "cache")


class Encoded(SampleDataset):
    """Encodes each sample once, because the encoder is not tested here."""

    def __getitem__(self, index: int):
        known = self.__dict__.setdefault("known", {})
        if index not in known:
            known[index] = super().__getitem__(index)
        return dict(known[index])


@cache
def samples() -> list:
    """Samples for one row that differ in images, lengths and number of turns."""
    turn = lambda role, text: {"from": role, "value": text}  # noqa: E731
    records = [
        {
            "image": [picture(96, 64)],
            "conversations": [turn("human", "<image>\nWhat is it?"), turn("gpt", "A blur.")],
        },
        {"conversations": [turn("human", "Say hello."), turn("gpt", "Hello, hello there.")]},
        {
            "image": [picture(64, 128, 1), picture(50, 70, 2)],
            "conversations": [
                turn("human", "<image>\n<image>\nSame?"),
                turn("gpt", "No."),
                turn("human", "Why?"),
                turn("gpt", "Colours differ."),
            ],
        },
    ]
    return [encoder()(record) for record in records]


def rows(together: bool) -> list[dict]:
    groups = [samples()] if together else [[sample] for sample in samples()]
    return [QwenVLCollator()(group) for group in groups]


def fresh(kind: str, bits: str = "whole"):
    return copy.deepcopy(base_model(kind, bits))


def prepared(case: Case, kind: str):
    torch.manual_seed(0)
    tuner = tuner_of(case, kind)
    batches = start_batches(tuner, digits(), 0) if wants_data(tuner) else None
    return prepare_model(fresh(kind, case.bits), tuner, batches=batches)


def logits(model, training: bool = False) -> torch.Tensor:
    model.train(training)
    with torch.no_grad():
        inputs = [{k: v for k, v in row.items() if k not in ("labels", "sources")} for row in rows(together=False)]
        return torch.cat([model(**row).logits for row in inputs], dim=1)


def run(model, together: bool):
    """Return logits in training mode and the gradients of the summed loss, for all samples."""
    model.train()
    model.zero_grad(set_to_none=True)
    batches = rows(together)
    with torch.no_grad():
        plain = [{k: v for k, v in row.items() if k not in ("labels", "sources")} for row in batches]
        found = torch.cat([model(**row).logits for row in plain], dim=1)
    sum(loss_sum(model, split_labels(row)) for row in batches).backward()
    return found, {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


# -- the columns -------------------------------------------------------------------------------------------------------


def close(found, expected, tolerance=2e-5) -> bool:
    return bool(torch.allclose(found, expected, rtol=1e-4, atol=tolerance))


def check_start(case, kind):
    return close(logits(prepared(case, kind)), logits(fresh(kind, case.bits)))


def trained(case, kind):
    """Return a model after three optimizer steps, and its parameters before them."""
    model = prepared(case, kind)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    model.train()
    optimizer = torch.optim.AdamW(param_groups(model, learning_rate=1e-2, weight_decay=0.0))
    for _ in range(3):
        optimizer.zero_grad()
        sum(loss_sum(model, split_labels(row)) for row in rows(together=True)).backward()
        optimizer.step()
    return model, before


def check_isolated(model, before):
    named = {name for name, value in model.named_parameters() if value.requires_grad}
    moved = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    return bool(named) and moved == named


def check_loads(model, kind, expected, folder, bits):
    model.save_pretrained(folder)
    assert not list(folder.glob("*.bin"))
    return close(logits(opened(folder, kind, bits)), expected, 1e-5)


def opened(folder, kind, bits="whole"):
    if (folder / "adapter_config.json").is_file():
        register_adapters()
        return PeftModel.from_pretrained(fresh(kind, bits), str(folder))
    return load_model(str(folder), torch_dtype="float32", attn_impl="sdpa")


def check_merges(kind, expected, folder, bits):
    if not (folder / "adapter_config.json").is_file():
        return close(logits(opened(folder, kind)), expected)
    if BASES[bits]:
        (folder / "recipe.yaml").write_text(yaml.safe_dump({"quantization": BASES[bits]}), encoding="utf-8")
    try:
        merge(folder, folder.with_name("merged"))
    except CheckpointError:
        return False
    model = opened(folder.with_name("merged"), kind)
    assert {name for name, _ in model.named_parameters()} == {name for name, _ in base_model(kind).named_parameters()}
    return close(logits(model), expected, 1e-4)


def check_packs(model):
    (alone, grads_alone), (packed, grads_packed) = run(model, False), run(model, True)
    same = close(packed, alone) and grads_packed.keys() == grads_alone.keys()
    return same and same_gradients(grads_packed, grads_alone)


def same_gradients(found, expected):
    scale = max(float(grad.abs().max()) for grad in expected.values())
    return all(
        torch.allclose(found[name], grad, rtol=1e-3, atol=1e-4 * float(grad.abs().max()) + 1e-6 * scale)
        for name, grad in expected.items()
    )


def check_recomputes(model):
    torch.manual_seed(1)
    _, plain = run(model, True)
    torch.manual_seed(1)
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    _, again = run(model, True)
    return plain.keys() == again.keys() and same_gradients(again, plain)


def training(case, kind, folder, resume=None):
    """Train eight steps of 16 digits, saving at the fourth. Returns the trainable weights and the model."""
    arguments = {
        "max_steps": 8,
        "save_steps": 4,
        "learning_rate": case.rate,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": 1,
        "weight_decay": 0.1,
        "gradient_accumulation_steps": 2,
        "activation_checkpointing": True,
        "activation_checkpointing_kwargs": {"use_reentrant": False},
        "logging_steps": 1,
        "seed": 3,
    } | case.arguments
    options = {"lorap_lr_ratio": arguments.pop("lorap_lr_ratio", None)}
    args = quiet_arguments(folder, **arguments)
    model = prepared(case, kind)
    trainer = QwenVLTrainer(
        model, args, processor=encoder().processor, train_dataset=digits(), max_length=256, **options
    )
    if case.lisa:
        trainer.add_callback(LisaCallback(case.lisa, 2, 0))
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=resume)
    return {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}, model


def digit_loss(model) -> float:
    """Return the summed loss over the answers to 16 digits, without dropout."""
    model.eval()
    with torch.no_grad():
        row = QwenVLCollator()([digits()[index] for index in range(16)])
        return float(loss_sum(model, split_labels(row)))


def experts_of(model):
    names = [name for name, value in model.named_parameters() if value.requires_grad]
    return "trained" if any(".experts." in name for name in names) else "not trained"


def tried(name: str, kind: str) -> dict[str, str]:
    """Run one method on one architecture. Returns column -> ``yes``, or ``no`` with the reason."""
    case, found = CASES[name], {}
    found["start"] = check_start(case, kind)
    model, before = trained(case, kind)
    found["isolated"] = check_isolated(model, before)
    with tempfile.TemporaryDirectory() as path:
        folder = Path(path)
        exact = logits(model, training=case.bits != "whole")  # on a CPU, evaluation in 4 bits rounds to bfloat16
        expected = logits(model)
        assert not close(expected, logits(fresh(kind, case.bits)), 1e-3), "vacuous: nothing was learned"
        found["loads"] = check_loads(model, kind, expected, folder / "saved", case.bits)
        found["merges"] = check_merges(kind, exact, folder / "saved", case.bits)
        experts = experts_of(model) if kind.endswith("moe") else "none"
        found["packs"] = check_packs(model)
        found["recomputes"] = check_recomputes(model)
        whole, model = training(case, kind, folder / "run")
        found["learns"] = digit_loss(model) < 0.95 * digit_loss(prepared(case, kind))
        again, _ = training(case, kind, folder / "run", str(folder / "run" / "checkpoint-4"))
        found["resumes"] = whole.keys() == again.keys() and all(torch.equal(whole[key], again[key]) for key in whole)
        found["bfloat16"] = check_shipped(case, kind, checkpoint(kind), folder)
    cells = {}
    for column in COLUMNS:
        if column == "experts":
            cells[column] = experts
        elif column in case.cannot:
            assert not found[column], f"{name}: {column} is listed as impossible but works"
            cells[column] = f"no: {case.cannot[column]}"
        else:
            cells[column] = "yes" if found[column] else "no"
    return cells


def row(name: str) -> str:
    """Return a Markdown row of the table. A cell that differs between the architectures shows both, dense first."""
    torch.set_num_threads(1)
    both = {kind: tried(name, kind) for kind in KINDS}
    cells = [joined(both, column) for column in COLUMNS]
    cells += [as_others(lambda kind=kind: tried(name, kind), both) for kind in FAMILIES.values()]
    return f"| {name} | " + " | ".join(cells) + " |"


def as_others(try_it: Callable[[], dict[str, str]], both: dict[str, dict[str, str]]) -> str:
    """Return the cell of another family: yes, the columns that differ from a dense Qwen3-VL, or the refusal."""
    try:
        found = try_it()
    except RecipeError as error:
        return f"no: {one_line(error)}"
    other = [column for column in COLUMNS if column != "experts" and found[column] != both["dense"][column]]
    return f"no: {', '.join(other)}" if other else "yes"


def table(rows: list[str]) -> str:
    columns = [*COLUMNS, *FAMILIES]
    return "\n".join(["| method | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|", *rows])


def joined(both: dict[str, dict[str, str]], column: str) -> str:
    dense, moe = (both[kind][column] for kind in KINDS)
    return moe if dense in (moe, "none") else f"{dense} / {moe}"


def written(document: str, rows: str) -> str:
    """Return the document with a new table between its markers."""
    before, rest = document.split(BEGIN)
    return f"{before}{BEGIN}\n{rows}\n{END}{rest.split(END)[1]}"


def main(names: list[str]) -> None:
    write = names == ["--write"]
    rows = []
    with ProcessPoolExecutor(max_workers=len(os.sched_getaffinity(0))) as pool:
        for line in pool.map(row, list(CASES) if write or not names else names):
            print(line, flush=True)
            rows.append(line)
    if write:
        GUIDE.write_text(written(GUIDE.read_text(encoding="utf-8"), table(rows)), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
