"""Checks that saved weights, loaded by plain transformers and peft in a new process, give the trained model's answers.

An adapter is loaded on its base model, and a second time merged into it. An adapter type of this library, which plain
peft does not know, is loaded by `load_model` instead, and a row says so.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import GenerationConfig

from qwenvl_ft.errors import CheckpointError
from qwenvl_ft.prove.answers import Answers, answer, at_once, generation, write_inputs
from qwenvl_ft.prove.capacity import GIB, free_disk
from qwenvl_ft.prove.measure import alone_rows, relative, seen_logits
from qwenvl_ft.prove.subject import FACTOR, Subject
from qwenvl_ft.prove.table import FAILED, OK, SKIPPED, Row

SCRIPT = Path(__file__).with_name("plain_transformers.py")
LIMIT_S = 900
"""Seconds after which the new process is stopped."""
GENERATION = (
    "max_new_tokens",
    "min_new_tokens",
    "do_sample",
    "use_cache",
    "output_logits",
    "return_dict_in_generate",
    "eos_token_id",
    "pad_token_id",
)
"""Generation settings that are passed to the new process."""


class Saved:
    """The checks ``saved`` and ``merged``."""

    name = "saved"

    def __init__(self) -> None:
        self.trained = Answers()
        self.jobs: list[dict[str, Any]] = []
        self.skipped: list[Row] = []
        self.cached = 0.0

    def measure(self, subject: Subject) -> None:
        subject.say(f"generating {subject.options.new_tokens} tokens per answer, and saving")
        self.trained = Answers(subject.after)
        inputs = subject.folder / "inputs"
        inputs.mkdir()
        settings = generation(subject)
        paths = [write_inputs(subject, k, inputs) for k in range(len(subject.samples))]
        answers = [answer(subject.model, prompt, settings, subject) for _, prompt in paths]
        self.trained.tokens, self.trained.steps = [tokens for tokens, _ in answers], [steps for _, steps in answers]
        whole = [
            at_once(subject.model, prompt, tokens, subject)
            for (_, prompt), (tokens, _) in zip(paths, answers, strict=True)
        ]
        self.cached = max(relative(steps, other) for (_, steps), other in zip(answers, whole, strict=True))
        folder = subject.folder / "saved"
        subject.trainer.save_model(str(folder))
        self.jobs = list(self._jobs(subject, folder, paths, settings))

    def rows(self, subject: Subject) -> Iterator[Row]:
        yield Row.judged(
            "generation",
            "logits token by token with a cache, against one pass over the whole answer",
            figure=self.cached,
            tolerance=FACTOR * subject.noise("logits") + subject.floor,
        )
        yield from self.skipped
        jobs = [job for job in self.jobs if job["plain"]]
        if jobs:
            subject.say("loading the saved weights with plain transformers, in a new process")
            failure = _run(jobs, subject)
        for job in self.jobs:
            if not job["plain"]:
                subject.say(f"loading the saved weights with load_model: plain peft has no {job['kind']}")
                yield from self._compared(subject, job, _opened_by_us(subject, Path(job["adapter"])))
            elif not Path(job["out"]).is_file():
                error = Path(job["out"]).with_suffix(".error")
                why = error.read_text(encoding="utf-8") if error.is_file() else failure
                yield Row(check=job["check"], compared=job["opened"], verdict=FAILED, note=why[:600])
            else:
                saved = load_file(job["out"])
                columns = (
                    [saved[f"{k}.{n}"] for n in range(len(subject.samples))] for k in ("logits", "tokens", "steps")
                )
                yield from self._compared(subject, job, Answers(*columns))

    def _jobs(
        self, subject: Subject, folder: Path, paths: list[tuple[Path, Path]], settings: GenerationConfig
    ) -> Iterator[dict[str, Any]]:
        """Yield a job for each way of loading the saved weights; a skipped way becomes a row."""
        adapter = (folder / "adapter_config.json").is_file()
        kind = json.loads((folder / "adapter_config.json").read_text())["peft_type"] if adapter else ""
        common = {
            "samples": [[str(path) for path in pair] for pair in paths],
            "device": str(subject.device),
            "dtype": str(subject.dtype).removeprefix("torch."),
            "generation": {key: getattr(settings, key) for key in GENERATION},
            "text": {},
            "quantization": {},
            "revision": "main",
            "adapter": "",
            "plain": True,
            "kind": kind,
        }
        if not adapter:
            yield common | {
                "check": "saved weights",
                "opened": "by plain transformers",
                "model": str(folder),
                "out": str(subject.folder / "saved.safetensors"),
            }
            self._skip(subject, "merged", "train_type full saves a whole model: there is nothing to merge")
            return
        known = _plain_peft_knows(kind)
        if not known:
            self._skip(
                subject, "saved", f"{kind} is an adapter of this library: plain peft does not know it", plain=True
            )
        yield (
            common
            | _over_base(subject)
            | {
                "check": "saved adapter",
                "opened": "on its base by plain transformers and peft" if known else "on its base by load_model",
                "adapter": str(folder),
                "plain": known,
                "out": str(subject.folder / "saved.safetensors"),
            }
        )
        why = self._unmergeable(subject, known)
        if why:
            self._skip(subject, "merged", why)
        elif "merged" not in subject.options.skip:
            yield common | {
                "check": "merged model",
                "opened": "by plain transformers",
                "model": str(subject.folder / "merged"),
                "out": str(subject.folder / "merged.safetensors"),
            }

    def _unmergeable(self, subject: Subject, known: bool) -> str:
        """Return the reason why no merged model is made; empty if one is."""
        if not known:
            return "the method changes no weight of the model, so it cannot be merged"
        bits = subject.recipe.quantization.quantization_bit
        if bits is None and getattr(subject.model.config, "quantization_config", None) is not None:
            return "the weights of the base model are quantised, so the adapter cannot be merged into them"
        needed = sum(p.numel() for p in subject.model.parameters()) * subject.dtype.itemsize
        free = free_disk(subject.folder)
        if needed <= free:
            return ""
        space = f"{free / GIB:.1f} GiB are free in {subject.folder.parent}: choose another --folder"
        return f"a merged model takes {needed / GIB:.1f} GiB, and {space}"

    def merge(self, subject: Subject) -> None:
        """Write the merged model, after the trained model has been released."""
        from qwenvl_ft.export.merge import merge

        for job in [job for job in self.jobs if job["check"] == "merged model"]:
            subject.say("merging")
            try:
                merge(subject.folder / "saved", job["model"], torch_dtype=job["dtype"])
            except CheckpointError as error:
                self.jobs.remove(job)
                self.skipped.append(Row(check=job["check"], compared="merging", verdict=FAILED, note=str(error)))

    def _skip(self, subject: Subject, name: str, why: str, *, plain: bool = False) -> None:
        if name in subject.options.skip:
            return
        check = {"saved": "saved adapter", "merged": "merged model"}[name]
        compared = "opened by plain peft" if plain else "opened by plain transformers"
        self.skipped.append(Row(check=check, compared=compared, verdict=SKIPPED, note=why))

    def _compared(self, subject: Subject, job: dict[str, Any], found: Answers) -> Iterator[Row]:
        """Compare logits and tokens. The fault is the change that training made, which a loader that drops weights
        loses."""
        limit = FACTOR * subject.noise("logits") + subject.floor
        errors = [relative(*pair) for pair in zip(found.logits, self.trained.logits, strict=True)]
        changes = [relative(*pair) for pair in zip(subject.before, subject.after, strict=True)]
        figure = max(errors, key=lambda error: float("inf") if error != error else error)
        yield Row.judged(
            job["check"],
            f"logits, opened {job['opened']}",
            figure=figure,
            tolerance=limit,
            fault=max(changes),
        )
        yield _tokens_row(job, self.trained, found, limit)


def _tokens_row(job: dict[str, Any], ours: Answers, theirs: Answers, limit: float) -> Row:
    """Compare answers token by token, up to a tie: rounding then decides, and the rest of the answer differs."""
    same, total, ties, wrong = 0, 0, [], ""
    for k, (expected, found) in enumerate(zip(ours.tokens, theirs.tokens, strict=True)):
        total += len(expected)
        if torch.equal(expected, found):
            same += len(expected)
            continue
        length = min(len(expected), len(found))
        differ = (expected[:length] != found[:length]).nonzero()
        place = int(differ[0]) if len(differ) else -1
        same += max(place, 0)
        if place >= 0 and relative(theirs.steps[k][place], ours.steps[k][place]) <= limit:
            ties.append(f"token {place + 1} of sample {k}")
        else:
            wrong = wrong or f"sample {k} differs from token {place + 1} on"
    note = f"except for a tie within rounding at {', '.join(ties)}" if ties and not wrong else wrong
    return Row(
        check=job["check"],
        compared=f"answers token by token, opened {job['opened']}",
        figure=f"{same} of {total} the same",
        tolerance="all but ties",
        verdict=FAILED if wrong else OK,
        note=note,
    )


def _opened_by_us(subject: Subject, adapter: Path) -> Answers:
    """Return the answers of a new model that `load_model` loads from an adapter's folder."""
    from qwenvl_ft.model.load import load_model
    from qwenvl_ft.model.patch_embed import use_raw_patches

    model = load_model(
        adapter,
        torch_dtype=str(subject.dtype).removeprefix("torch."),
        attn_impl=subject.recipe.model.attn_impl,
        quantization=subject.recipe.quantization,
    ).to(subject.device)
    use_raw_patches(model, subject.processor.image_processor)
    rows = alone_rows(subject)
    found = Answers(seen_logits(model, rows, autocast=subject.autocast, device=subject.device))
    for index in range(len(subject.samples)):
        path = subject.folder / "inputs" / f"{index}.prompt.safetensors"
        tokens, steps = answer(model, path, generation(subject), subject)
        found.tokens.append(tokens)
        found.steps.append(steps)
    return found


def _over_base(subject: Subject) -> dict[str, Any]:
    """Return the job entries by which plain transformers loads the base model of an adapter."""
    from qwenvl_ft.model.quantization import bnb_config

    settings, model = subject.recipe.model, subject.model
    found: dict[str, Any] = {
        "model": str(Path(settings.model).resolve()) if Path(settings.model).is_dir() else settings.model
    }
    found["revision"] = settings.model_revision
    if settings.rope_scaling is not None or settings.max_model_len is not None:
        text = model.config.get_text_config()
        found["text"] = {name: getattr(text, name) for name in ("rope_parameters", "max_position_embeddings")}
    if subject.recipe.quantization.quantization_bit is not None:
        found["quantization"] = {
            key: value
            for key, value in bnb_config(subject.recipe.quantization, model.config).to_dict().items()
            if not key.startswith("_") and key != "quant_method"
        }
    return found


def _plain_peft_knows(kind: str) -> bool:
    """Return True if a ``peft_type`` is one of peft's own."""
    from peft import PeftType

    return kind in {entry.value for entry in PeftType}


def _run(jobs: list[dict[str, Any]], subject: Subject) -> str:
    """Run the script over all jobs; return its error output if it failed, otherwise ``""``."""
    path = subject.folder / "jobs.json"
    path.write_text(json.dumps(jobs), encoding="utf-8")
    command = [sys.executable, "-P", str(SCRIPT), str(path)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False, cwd=subject.folder)
    except subprocess.TimeoutExpired:
        return f"the new process did not end within {LIMIT_S} s"
    return "" if done.returncode == 0 else f"the new process failed: {' '.join(done.stderr.split())[-500:]}"
