"""Writes what an engine takes, from an adapter, a checkpoint or a merged model, and the command that serves it.

    qwenvl-ft export output/my_run served --for vllm

Nothing is written that the engine would leave out in silence (`engines`); such an adapter needs ``--merge``. Beside the
weights there are the processor of the training run, in the files of old and new releases, and a chat template that has
the system prompt of training as its default and writes videos as in training (chat_template.py).
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwenvl_ft.errors import CheckpointError, unknown_name
from qwenvl_ft.export.chat_template import switches_flag, switches_of, with_system_prompt, write_videos
from qwenvl_ft.export.engines import ENGINES, Engine, fate_of, rules_of
from qwenvl_ft.export.merge import merge, require_new, trained_over
from qwenvl_ft.export.plain_lora import completed, plain_shapes, read_config, read_plain, write_plain
from qwenvl_ft.export.released import require_released
from qwenvl_ft.model.adapters.load import base_of_adapter, trained_lengths
from qwenvl_ft.model.anatomy import family_of
from qwenvl_ft.model.load import load_processor
from qwenvl_ft.model.released_layout import released_shapes
from qwenvl_ft.model.source import PROCESSOR_FILES, load_config, local_directory
from qwenvl_ft.recipe.provenance import saved_recipe
from qwenvl_ft.upstream.processors import frame_cap, shows_videos

MODEL_FILES = ("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "recipe.yaml")
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM's --max-lora-rank accepts."""
VLLM_SAMPLING = {"fps": 2, "min_frames": 4, "max_frames": 768}
"""How vLLM samples the frames of a video for these models; it reads no saved processor for that."""


@dataclass
class Exported:
    """Result of `export`."""

    folder: Path
    engine: str
    kind: str
    """``adapter`` or ``model``."""
    base: str | None = None
    """Base model of an adapter."""
    rank: int = 0
    """Rank of an adapter."""
    flags: list[str] = field(default_factory=list)
    """Flags without which the engine would leave out a part."""
    notes: list[str] = field(default_factory=list)
    """What a user has to know, in sentences."""
    switches: dict[str, bool] = field(default_factory=dict)
    """Variables of the chat template that a server has to set as the training run did."""
    command: str = ""
    """Starts the engine; empty for libraries."""


def export(
    checkpoint: str | Path,
    out: str | Path,
    engine: str,
    *,
    merged: bool = False,
    base: str | None = None,
    torch_dtype: str = "auto",
    media_per_prompt: dict[str, int] | None = None,
) -> Exported:
    """Write what an engine takes to a new folder.

    Args:
        checkpoint: folder of an adapter or of a whole model.
        engine: a key of ``ENGINES``.
        merged: merge an adapter into its base model.
        base: the base model, if not the one that ``adapter_config.json`` names.
        torch_dtype: dtype of a merged model; ``auto`` is the base model's.
        media_per_prompt: ``image`` and ``video`` -> largest number in a prompt, for vLLM's command.

    Raises:
        RecipeError: an unknown engine.
        CheckpointError: the engine does not take the checkpoint, or would leave out a part of it. Nothing is written.
    """
    if engine not in ENGINES:
        raise unknown_name("--for", engine, ENGINES)
    target, folder = require_new(out), local_directory(Path(checkpoint))
    assert folder is not None
    chosen, adapter = ENGINES[engine], (folder / "adapter_config.json").is_file()
    if adapter and chosen.form is None and not merged:
        raise CheckpointError(f"{folder} is an adapter, and {chosen.title} takes whole models. Add --merge.")
    if not adapter and not chosen.models:
        raise CheckpointError(f"{folder} is a whole model, and {chosen.title} takes adapters. Use --for transformers.")
    with _written_whole(target) as partial:
        result = Exported(target, engine, "model")
        if adapter and merged:
            partial.rmdir()
            merge(folder, partial, base=base, torch_dtype=torch_dtype)
        elif adapter:
            result = _export_adapter(folder, partial, target, chosen, engine, base)
        else:
            _link(folder, partial, MODEL_FILES)
        if result.kind == "model":
            require_released(partial)
        if (folder / "recipe.yaml").is_file() and not (partial / "recipe.yaml").exists():
            shutil.copy2(folder / "recipe.yaml", partial / "recipe.yaml")
        result.notes += _save_processor(folder, partial, base, chosen)
        processor = load_processor(partial)
        result.notes += _notes(folder, adapter, result, processor)
        result.switches = switches_of(folder, processor)
        result.command = start_command(result, partial, media_per_prompt or {})
    return result


def start_command(exported: Exported, folder: Path, media_per_prompt: dict[str, int]) -> str:
    """Return the command that serves an export; empty for peft and transformers.

    Args:
        folder: where the export's files are now.
    """
    if exported.engine not in COMMANDS:
        return ""
    words = COMMANDS[exported.engine](exported, load_processor(folder), media_per_prompt)
    return shlex.join([*words, *switches_flag(exported.switches)])


def _vllm(exported: Exported, processor: Any, media_per_prompt: dict[str, int]) -> list[str]:
    words = ["vllm", "serve", exported.base or str(exported.folder)]
    if exported.kind == "adapter":
        largest = next(rank for rank in RANKS if rank >= exported.rank)
        words += ["--enable-lora", "--max-lora-rank", str(largest), *exported.flags]
        words += ["--lora-modules", f"{exported.folder.name}={exported.folder}"]
        words += ["--chat-template", str(exported.folder / "chat_template.jinja")]
        areas: dict[str, Any] = {"images_kwargs": {"size": _area(processor.image_processor)}}
        areas["videos_kwargs"] = {"size": _area(processor.video_processor)}
        if frame_cap(processor.video_processor) is not None:
            areas["videos_kwargs"]["cap_pixels_per_frame"] = True
        words += ["--mm-processor-kwargs", json.dumps(areas)]
    sampling = {name: getattr(processor.video_processor, name) for name in VLLM_SAMPLING}
    if sampling != VLLM_SAMPLING:
        words += ["--media-io-kwargs", json.dumps({"video": sampling})]
    if media_per_prompt:
        words += ["--limit-mm-per-prompt", json.dumps(media_per_prompt)]
    return words


def _sglang(exported: Exported, processor: Any, media_per_prompt: dict[str, int]) -> list[str]:
    words = ["python", "-m", "sglang.launch_server", "--model-path", exported.base or str(exported.folder)]
    config: dict[str, Any] = {"video": {"fps": processor.video_processor.fps}}
    if exported.kind == "adapter":
        words += ["--enable-lora", "--lora-paths", f"{exported.folder.name}={exported.folder}"]
        words += ["--chat-template", str(exported.folder / "chat_template.jinja")]
        config["image"] = {"size": _area(processor.image_processor)}
    words += ["--mm-process-config", json.dumps(config)]
    return words


COMMANDS = {"vllm": _vllm, "sglang": _sglang}
"""Engine -> function that builds the words of its command."""


def _export_adapter(folder: Path, partial: Path, target: Path, engine: Engine, name: str, base: str | None) -> Exported:
    source, revision = (base, None) if base else base_of_adapter(folder)
    result = Exported(target, name, "adapter", base=source)
    if engine.form == "saved":
        _require_peft(folder)
        _link(folder, partial, ("adapter_model.safetensors", "adapter_config.json"))
        return result
    assert engine.form is not None
    scaling, _ = trained_lengths(folder)
    if scaling is not None:
        raise CheckpointError(
            f"{folder} was trained with rope_scaling={scaling}, which the config of its base model lacks, so "
            f"{engine.title} would compute other positions. Add --merge."
        )
    config = load_config(source, revision=revision)
    rules, names = rules_of(engine, config.model_type), family_of(config.model_type)
    shapes = plain_shapes(released_shapes(config), turned=names.released_before_5)
    shapes.setdefault(f"{names.head}.weight", shapes[f"{names.embeddings}.weight"])  # a tied head is not stored
    try:
        lora = read_plain(folder, shapes)
    except CheckpointError as error:
        raise CheckpointError(f"{engine.title} cannot serve this adapter: {error} Add --merge.") from error
    lora.pairs.update(completed(lora.pairs, shapes))
    modules = [weight.removesuffix(".weight") for weight in lora.pairs]
    fate = fate_of([_as_module(name) for name in modules], rules)
    if fate.faults:
        raise CheckpointError(f"{engine.title} cannot serve {folder}: {'; '.join(fate.faults)}. Add --merge.")
    result.rank, result.flags = write_plain(lora, partial, engine.form), sorted(fate.flags)
    if name == "vllm" and result.rank > RANKS[-1]:
        raise CheckpointError(f"{folder} has rank {result.rank}; vLLM takes at most {RANKS[-1]}. Add --merge.")
    written = read_config(partial) | {"base_model_name_or_path": source}
    (partial / "adapter_config.json").write_text(json.dumps(written, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return result


def _as_module(name: str) -> str:
    """Return the module of experts for one of their weights."""
    return name.rpartition(".")[0] if ".mlp.experts." in name else name


def _require_peft(folder: Path) -> None:
    from qwenvl_ft.model.adapters.base import OwnType

    kind = str(read_config(folder)["peft_type"])
    if kind in set(OwnType):
        raise CheckpointError(
            f"{folder} is an adapter of type {kind}, which peft does not have. Serve it with this package: "
            f"qwenvl-ft infer --model {folder}."
        )


def _save_processor(folder: Path, partial: Path, base: str | None, engine: Engine) -> list[str]:
    """Write the processor for old and new releases, with the chat template of training; return notes for the user.

    transformers 5 writes both image processors into processor_config.json, where older releases do not look.
    """
    has_own = any((folder / name).is_file() for name in PROCESSOR_FILES)
    processor = load_processor(folder if has_own or not base else base)
    notes = write_videos(processor, pair=not engine.takes_bare_videos)
    system_prompt = (saved_recipe(folder).get("template") or {}).get("system_prompt")
    if system_prompt:
        processor.chat_template = with_system_prompt(processor.chat_template, system_prompt)
    processor.save_pretrained(partial)
    processor.image_processor.save_pretrained(partial)
    processor.video_processor.save_pretrained(partial)
    return notes


def _notes(folder: Path, adapter: bool, exported: Exported, processor: Any) -> list[str]:
    notes, template = [], saved_recipe(folder).get("template") or {}
    if template.get("system_prompt"):
        notes.append("The chat template begins with the system prompt of training; a request's own replaces it.")
    if template.get("tools_prompt"):
        notes.append("The model was trained with tools: requests must send them (tools).")
    if adapter and (bits := trained_over(folder).quantization_bit) is not None:
        notes.append(f"The adapter was trained over {bits}-bit weights; on 16-bit weights its answers can differ.")
    cap = frame_cap(processor.video_processor)
    if exported.kind == "adapter" and exported.engine == "vllm" and cap is not None:
        notes.append(
            f"A frame of a video had at most {cap} tokens in training. vLLM takes this number from the base model's "
            "processor alone: set max_video_tokens there, or add --merge."
        )
    if exported.engine == "sglang" and shows_videos(processor.video_processor):
        notes.append(
            "SGLang can show a video to the model otherwise than training did: it gets the chat template with vision "
            "tokens around a video, resizes frames by rules of its own, and ignores template.video_frame_max_pixels."
        )
    return notes


def _area(part: Any) -> dict[str, int]:
    return {name: int(part.size[name]) for name in ("shortest_edge", "longest_edge")}


def _link(folder: Path, partial: Path, patterns: tuple[str, ...]) -> None:
    """Put files into another folder; weights as hard links where the file system has them."""
    for file in (file for pattern in patterns for file in sorted(folder.glob(pattern))):
        try:
            if file.suffix != ".safetensors":
                raise OSError
            os.link(file.resolve(), partial / file.name)
        except OSError:
            shutil.copy2(file, partial / file.name)


@contextmanager
def _written_whole(target: Path) -> Iterator[Path]:
    """Yield a folder that becomes ``target`` if the block ends without an error, and is removed otherwise."""
    partial = target.with_name(f".{target.name}.partial-export")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        if target.exists():
            target.rmdir()
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
