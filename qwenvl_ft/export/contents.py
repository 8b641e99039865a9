"""Summarises a checkpoint folder: method, weights by part, ranks, file sizes, and how to load or resume it.

    qwenvl-ft inspect output/my_run/checkpoint-500 --keys merger

Weights are read one tensor at a time, so memory use does not exceed the largest tensor.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwenvl_ft.checkpoint.complete import NO_OPTIMIZER, missing
from qwenvl_ft.errors import CheckpointError, one_line
from qwenvl_ft.export.rank_lines import rank_lines
from qwenvl_ft.model.anatomy import canonical_name, part_of
from qwenvl_ft.model.source import load_config
from qwenvl_ft.recipe.methods import reads
from qwenvl_ft.recipe.provenance import saved_recipe

ROWS = ("vision", "merger", "llm", "head", "shared")
"""Rows of the table: the parts, the language head by itself, and weights that an adapter shares among layers."""
FILES = {
    "weights": ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "adapter_model.bin"),
    "optimizer, schedule, random states": (
        "optimizer*",
        "scheduler.pt",
        "scaler.pt",
        "rng_state*",
        "global_step*/**/*",
    ),
    "processor": ("*token*", "chat_template*", "*processor*", "vocab*", "merges.txt"),
}
"""Kind of file -> patterns. The first match counts; all other files are ``other``."""


@dataclass
class Weights:
    """Totals over the tensors of one row."""

    tensors: int = 0
    parameters: int = 0
    bytes: int = 0
    square: float = 0.0
    """Sum of squares."""

    def add(self, value: Tensor) -> None:
        self.tensors += 1
        self.parameters += value.numel()
        self.bytes += value.numel() * value.element_size()
        self.square += float(value.detach().double().square().sum()) if value.is_floating_point() else 0.0

    @property
    def counts(self) -> dict[str, Any]:
        """The totals by name, with the size in MiB and the Euclidean norm of all tensors together."""
        size = round(self.bytes / 2**20, 3)
        return {"tensors": self.tensors, "parameters": self.parameters, "mib": size, "norm": self.square**0.5}


@dataclass
class Contents:
    """Result of `read_contents`."""

    folder: str
    kind: str
    """``adapter`` or ``model``."""
    method: str
    """peft_type of an adapter, model_type of a model."""
    recipe: dict[str, Any]
    """Main training settings of the run, from recipe.yaml; empty without that file."""
    base: str | None
    """Base model of an adapter."""
    weights: dict[str, dict[str, Any]]
    """Row -> totals of the adapter's weights, or of the model's."""
    in_full: dict[str, dict[str, Any]]
    """Row -> totals of modules trained in full beside the adapter."""
    ranks: dict[int, int]
    """Rank -> number of layers that have it, for LoRA and AdaLoRA."""
    ranks_by_layer: dict[str, int]
    """Layer -> its rank; AdaLoRA has moved ranks to the layers where they help."""
    modules_to_save: list[str]
    files_mib: dict[str, float]
    """Kind of file -> size in MiB."""
    loads: str
    """The library that loads the folder."""
    resumes: str
    """``yes`` with the recipe key that resumes training, or ``no`` with the reason."""
    keys: list[tuple[str, list[int], str, float]] = field(default_factory=list)
    """Name, shape, dtype and norm of the listed tensors."""


def read_contents(checkpoint: str | Path, *, keys: str | None = None) -> Contents:
    """Summarise the folder of a checkpoint or model.

    Args:
        keys: if given, tensors whose name contains this text are listed.

    Raises:
        CheckpointError: there are no weights, a file is damaged, or no name contains ``keys``.
    """
    folder = Path(checkpoint).expanduser()
    files = (folder / name for name in ("adapter_config.json", "config.json"))
    config_file = next((file for file in files if file.is_file()), None)
    if config_file is None:
        inner = sorted(folder.glob("checkpoint-*"), key=lambda path: path.stat().st_mtime)
        hint = f" Did you mean {inner[-1]}?" if inner else ""
        raise CheckpointError(f"{folder} holds neither adapter_config.json nor config.json.{hint}")
    config = json.loads(config_file.read_text(encoding="utf-8"))
    adapter = config_file.name == "adapter_config.json"
    copies = [f".{name}." for name in config["modules_to_save"] or []] if adapter else []
    trained, full = {row: Weights() for row in ROWS}, {row: Weights() for row in ROWS}
    ranks: dict[str, int] = {}
    listed: list[tuple[str, list[int], str, float]] = []
    for name, value in _tensors(folder, adapter):
        (full if any(copy in name for copy in copies) else trained)[_row(name)].add(value)
        if name.endswith((".lora_A.weight", ".lora_A", ".lora_embedding_A")):
            ranks[_layer(name)] = _rank(name, value, config)
        if keys is not None and keys in name:
            shape, dtype = list(value.shape), str(value.dtype).removeprefix("torch.")
            listed.append((name, shape, dtype, float(value.double().norm())))
    if keys is not None and not listed:
        raise CheckpointError(f"no weight of {folder} has {keys!r} in its name.")
    return Contents(
        folder=str(folder),
        kind="adapter" if adapter else "model",
        method=config["peft_type" if adapter else "model_type"],
        recipe=_main_settings(folder),
        base=config["base_model_name_or_path"] if adapter else None,
        weights={row: found.counts for row, found in trained.items() if found.tensors},
        in_full={row: found.counts for row, found in full.items() if found.tensors},
        ranks=dict(sorted(Counter(ranks.values()).items())),
        ranks_by_layer=ranks,
        modules_to_save=[copy.strip(".") for copy in copies],
        files_mib=_sizes(folder),
        loads=_loads(config, adapter),
        resumes=_resumes(folder),
        keys=listed,
    )


def as_text(contents: Contents) -> str:
    """Format a summary for people: a title, a table by part, ranks, files."""
    settings = contents.recipe
    lines = [
        f"{contents.folder}: {contents.method} {contents.kind}" + (f" on {contents.base}" if contents.base else "")
    ]
    lines += [f"recipe: {' '.join(f'{key}={value}' for key, value in settings.items())}"] if settings else []
    rows = [("", "tensors", "parameters", "MiB", "norm")]
    for title, found in (("", contents.weights), (", in full", contents.in_full)):
        for part, count in found.items():
            numbers = (f"{count['tensors']:,}", f"{count['parameters']:,}", f"{count['mib']:,.2f}")
            rows.append((part + title, *numbers, f"{count['norm']:.4g}"))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    for row in rows:
        middle = "  ".join(text.rjust(width) for text, width in zip(row[1:], widths[1:], strict=True))
        lines.append(f"{row[0].ljust(widths[0])}  {middle}")
    if contents.ranks:
        lines.append("ranks: " + ", ".join(f"{rank} in {count} layers" for rank, count in contents.ranks.items()))
        lines += rank_lines(contents.ranks_by_layer) if len(contents.ranks) > 1 else []
    if contents.modules_to_save:
        lines.append(f"modules_to_save: {', '.join(contents.modules_to_save)}")
    files = ", ".join(f"{name} {size:,.1f}" for name, size in contents.files_mib.items())
    lines.append(f"MiB on disk: {files}; together {sum(contents.files_mib.values()):,.1f}")
    lines += [f"opens with: {contents.loads}", f"resumes: {contents.resumes}"]
    lines += [f"{name}  {shape}  {dtype}  norm {norm:.4g}" for name, shape, dtype, norm in contents.keys]
    return "\n".join(lines)


def _layer(name: str) -> str:
    """Return the layer that an A belongs to."""
    return canonical_name(name.rpartition(".lora_")[0])


def _row(name: str) -> str:
    """Return the table's row for a weight."""
    try:
        return "head" if canonical_name(name).startswith("lm_head") else part_of(name)
    except CheckpointError:
        return "shared"


def _tensors(folder: Path, adapter: bool) -> Iterator[tuple[str, Tensor]]:
    """Yield name and value of all weights in a folder, from safetensors, or else from torch's .bin files."""
    from safetensors import SafetensorError, safe_open

    stem = "adapter_model" if adapter else "model"
    files = sorted(folder.glob(f"{stem}*.safetensors"))
    old = sorted(folder.glob("adapter_model.bin" if adapter else "pytorch_model*.bin"))
    if not files and not old:
        raise CheckpointError(f"{folder} holds no weights: there is no {stem}*.safetensors.")
    for path in files or old:
        try:
            if path.suffix == ".bin":
                yield from torch.load(path, weights_only=True, map_location="cpu", mmap=True).items()
                continue
            with safe_open(str(path), framework="pt") as opened:
                for name in list(opened.keys()):
                    yield name, opened.get_tensor(name)
        except (SafetensorError, RuntimeError, EOFError) as error:
            raise CheckpointError(f"{path} is damaged: {one_line(error, 200)}") from error


def _rank(name: str, factor: Tensor, config: dict[str, Any]) -> int:
    """Return the rank of a layer from its A. For a MoE layer's experts, peft stacks the matrices of all experts."""
    if ".experts." not in name:
        return int(factor.shape[0])
    base = Path(config["base_model_name_or_path"] or "")
    if not (base / "config.json").is_file():
        return int(config["r"])
    return int(factor.shape[0]) // int(load_config(str(base)).get_text_config().num_experts)


def _main_settings(folder: Path) -> dict[str, Any]:
    """Return the main training settings in recipe.yaml."""
    written = saved_recipe(folder)
    if not written:
        return {}
    settings = {"model": (written.get("model") or {}).get("model")}
    for section, names in (
        ("quantization", ("quantization_bit",)),
        ("tuner", ("train_type", "freeze_llm", "freeze_vit", "freeze_aligner", "lora_rank", "lora_alpha")),
        ("training", ("learning_rate", "vit_lr", "aligner_lr", "num_train_epochs")),
    ):
        values = written.get(section) or {}
        used = [name for name in names if section != "tuner" or _applies(name, values.get("train_type"))]
        settings |= {name: values[name] for name in used if values.get(name) is not None}
    return settings


def _applies(name: str, train_type: Any) -> bool:
    """Return True if a train type uses a key of the ``tuner`` section."""
    return reads(train_type, name)


def _sizes(folder: Path) -> dict[str, float]:
    """Return kind of file -> size in MiB, without the checkpoints and logs inside of a run's folder."""
    sizes: Counter[str] = Counter()
    for path in folder.rglob("*"):
        inside_run = path.relative_to(folder).parts[0].startswith(("checkpoint-", "runs"))
        if path.is_file() and not inside_run:
            kinds = (
                kind for kind, patterns in FILES.items() if any(path.relative_to(folder).match(p) for p in patterns)
            )
            sizes[next(kinds, "other")] += path.stat().st_size
    return {kind: round(sizes[kind] / 2**20, 3) for kind in (*FILES, "other") if sizes[kind]}


def _loads(config: dict[str, Any], adapter: bool) -> str:
    if not adapter:
        return "plain transformers"
    if config["peft_type"] in ("BOTTLENECK", "REFT"):
        return "qwenvl_ft.load_model, on its base model; cannot be merged"
    return "plain peft, on its base model; can be merged by qwenvl-ft merge"


def _resumes(folder: Path) -> str:
    reason = missing(folder)
    if reason is None:
        return f"yes: training.resume_from_checkpoint={folder}"
    return f"no, {reason}" if reason == NO_OPTIMIZER else "no, it is the result of a run or of a merge"
