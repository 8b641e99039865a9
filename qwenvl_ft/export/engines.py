"""What serving engines do with the models and adapters that this package saves, read from their loaders.

Read: vLLM 0.32 and 0.33 (``lora/``, ``models/qwen3_vl.py``, ``models/qwen3_vl_moe.py``), vLLM 0.32
(``models/qwen3_5.py``), SGLang 0.5.23 (files of the same names), peft 0.21, transformers 5.24. tests/engine_cases.py
states the rules of the loaders again in code.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwenvl_ft.errors import CheckpointError
from qwenvl_ft.export.plain_lora import EXPERTS, NAME, not_plain, read_config

APPLIED, LOST, REFUSED, UNTRIED = "applied", "lost", "refused", "untried"
"""What becomes of an update: it is applied; the engine answers without it, and says nothing or one line among many; the
engine ends with an error; its loader has a way for it that was not seen to work."""
ATTENTION = r"\.language_model\.layers\.\d+\.self_attn\.[qkvo]_proj$"
MLP = r"\.language_model\.layers\.\d+\.mlp\.(gate|up|down)_proj$"
DELTA_NET = r"\.language_model\.layers\.\d+\.linear_attn\.(in_proj_(qkv|z|b|a)|out_proj)$"
DELTA_NET_OUT = r"\.language_model\.layers\.\d+\.linear_attn\.out_proj$"
"""SGLang joins in_proj_q, in_proj_k, in_proj_v and in_proj_z. It has no place for in_proj_qkv, which the models have,
nor for in_proj_a and in_proj_b."""
SHARED_EXPERT = r"\.mlp\.shared_expert(\.(gate|up|down)_proj|_gate)$"
HEAD, EMBEDDING, VISION, ROUTER = r"^lm_head$", r"\.embed_tokens$", r"\.visual\.", r"\.mlp\.gate$"
TOWER = "--enable-tower-connector-lora"

Rules = tuple[tuple[str, str], ...]
"""(regex searched in the name of an adapted module, what becomes of its update: one of the words above, or the flag
with which it is applied and without which it is lost); the first match counts, and what matches none is lost."""

_VLLM: Rules = ((ATTENTION, APPLIED), (HEAD, APPLIED), (VISION, TOWER), (EMBEDDING, REFUSED))
_SGLANG: Rules = ((ATTENTION, APPLIED), (HEAD, APPLIED), (EMBEDDING, UNTRIED))


@dataclass(frozen=True, kw_only=True)
class Engine:
    """What an engine takes."""

    title: str
    form: str | None = None
    """Form of an adapter, see `plain_lora`; ``saved`` is peft's own, None an engine that takes whole models only."""
    models: bool = True
    """True if it takes whole models."""
    rules: dict[str, Rules] = field(default_factory=dict)
    """``model_type`` -> rules of adapters in that form."""
    reads_scaling: bool = True
    """False if it computes lora_alpha / r for every layer, whatever use_rslora and the patterns say."""
    stacked_experts: bool = True
    """False if it leaves out experts in peft's form."""
    takes_bare_videos: bool = True
    """False if it is not known to find a video whose placeholder has no vision tokens around it."""


ENGINES = {
    "vllm": Engine(
        title="vLLM",
        form="stacked",
        rules={
            "qwen3_vl": ((MLP, APPLIED), *_VLLM),
            "qwen3_vl_moe": ((EXPERTS.pattern, APPLIED), (ROUTER, UNTRIED), *_VLLM),
            "qwen3_5": ((MLP, APPLIED), (DELTA_NET, APPLIED), *_VLLM),
            "qwen3_5_moe": (
                (EXPERTS.pattern, APPLIED),
                (ROUTER, UNTRIED),
                (SHARED_EXPERT, UNTRIED),
                (DELTA_NET, APPLIED),
                *_VLLM,
            ),
        },
    ),
    "sglang": Engine(
        title="SGLang",
        form="per_expert",
        reads_scaling=False,
        stacked_experts=False,
        takes_bare_videos=False,
        rules={
            "qwen3_vl": ((MLP, APPLIED), *_SGLANG),
            "qwen3_vl_moe": ((EXPERTS.pattern, APPLIED), *_SGLANG),
            "qwen3_5": ((MLP, APPLIED), (DELTA_NET_OUT, APPLIED), *_SGLANG),
            "qwen3_5_moe": (
                (EXPERTS.pattern, APPLIED),
                (SHARED_EXPERT, UNTRIED),
                (DELTA_NET_OUT, APPLIED),
                *_SGLANG,
            ),
        },
    ),
    "peft": Engine(title="peft", form="saved", models=False),
    "transformers": Engine(title="transformers"),
}
"""Name in ``qwenvl-ft export --for`` -> engine."""


@dataclass
class Fate:
    """What an engine does with the updates of an adapter."""

    applied: list[str] = field(default_factory=list)
    """Names of modules."""
    flags: dict[str, list[str]] = field(default_factory=dict)
    """Flag -> modules that are applied with it, and lost without."""
    lost: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    untried: list[str] = field(default_factory=list)

    @property
    def faults(self) -> list[str]:
        """Return what keeps the engine from serving the adapter, in words."""
        words = {"left out in silence": self.lost, "refused": self.refused, "not known to be applied": self.untried}
        return [f"{_modules(names)} {word}" for word, names in words.items() if names]


def fate_of(modules: Iterable[str], rules: Rules) -> Fate:
    """Return what becomes of the updates of these modules, named as in a released model or in peft's file."""
    fate = Fate()
    for module in modules:
        end = next((what for pattern, what in rules if re.search(pattern, module)), LOST)
        if end.startswith("--"):
            fate.flags.setdefault(end, []).append(module)
        else:
            getattr(fate, end).append(module)
    return fate


def rules_of(engine: Engine, model_type: str) -> Rules:
    """Return an engine's rules for adapters of a model type.

    Raises:
        CheckpointError: its loader has not been read for this type.
    """
    if model_type not in engine.rules:
        raise CheckpointError(
            f"what {engine.title} does with adapters of {model_type} is not known here. Serve the merged model: add "
            "--merge."
        )
    return engine.rules[model_type]


def silent_losses(adapter: Path, model_type: str) -> list[str]:
    """Return one line for each engine that would answer without an adapter, or with a wrong one, and not fail.

    The folder is taken as it was saved, without `serving.export`. Only the names in its files are read.
    """
    from safetensors import safe_open

    config, file = read_config(adapter), adapter / "adapter_model.safetensors"
    if not file.is_file():
        return []
    with safe_open(str(file), framework="pt") as opened:
        names = list(opened.keys())
    modules = sorted({match["module"] for name in names if (match := NAME.match(name))})
    lines = []
    for name, engine in ENGINES.items():
        if model_type not in engine.rules or not modules or config["peft_type"] != "LORA":
            continue
        fate = fate_of(modules, engine.rules[model_type])
        lost = [*fate.lost, *(module for found in fate.flags.values() for module in found)]
        lost += [] if engine.stacked_experts else [module for module in fate.applied if EXPERTS.search(module)]
        words = [f"without the update of {_modules(lost)}"] if lost else []
        if not engine.reads_scaling and _scales_by_layer(config):
            words.append("with another scaling of the updates (use_rslora, rank_pattern or alpha_pattern)")
        if not engine.reads_scaling and not_plain(config, names):
            words.append("without what was trained in full")
        if words:
            whole = "" if len(lost) < len(modules) else ", as the base model"
            lines.append(
                f"{engine.title} would answer {' and '.join(words)}{whole}, if this folder were served: serve what "
                f"qwenvl-ft export --for {name} writes"
            )
    return lines


def _scales_by_layer(config: dict[str, Any]) -> bool:
    return bool(config.get("use_rslora") or config.get("rank_pattern") or config.get("alpha_pattern"))


def _modules(names: list[str]) -> str:
    """Return the number of modules, and their kinds: ``24 modules (attn.proj, attn.qkv)``."""
    kinds = sorted(
        {
            ".".join(part for part in name.split(".") if not part.isdigit())
            .rpartition(".visual.")[2]
            .rpartition("layers.")[2]
            .removeprefix("blocks.")
            for name in names
        }
    )
    shown = ", ".join(kinds[:4]) + (", ..." if len(kinds) > 4 else "")
    return f"{len(names)} module{'s' * (len(names) > 1)} ({shown})"
