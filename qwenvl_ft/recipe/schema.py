"""The type of a resolved recipe: its sections, and how it is written back to a file.

The fields of each section, with their defaults and help, are in `qwenvl_ft.recipe.sections`; fields of transformers'
TrainingArguments are in ``Recipe.training.arguments``.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from qwenvl_ft.recipe.sections import field_names
from qwenvl_ft.recipe.sections.data import DataConfig as DataConfig
from qwenvl_ft.recipe.sections.data import PromptsConfig as PromptsConfig
from qwenvl_ft.recipe.sections.data import TemplateConfig as TemplateConfig
from qwenvl_ft.recipe.sections.evaluation import EvaluationConfig as EvaluationConfig
from qwenvl_ft.recipe.sections.model import DeepspeedConfig as DeepspeedConfig
from qwenvl_ft.recipe.sections.model import ModelConfig as ModelConfig
from qwenvl_ft.recipe.sections.model import QuantizationConfig as QuantizationConfig
from qwenvl_ft.recipe.sections.training import GALORE as GALORE
from qwenvl_ft.recipe.sections.training import TrainingConfig as TrainingConfig
from qwenvl_ft.recipe.sections.tuner import TunerConfig as TunerConfig
from qwenvl_ft.recipe.trainer_fields import HF_DEFAULTS as HF_DEFAULTS
from qwenvl_ft.recipe.trainer_fields import HF_LIMITS as HF_LIMITS
from qwenvl_ft.recipe.trainer_fields import HF_TYPES as HF_TYPES
from qwenvl_ft.recipe.trainer_fields import MIN_LR_SCHEDULES as MIN_LR_SCHEDULES

SECTIONS: dict[str, type] = {
    "model": ModelConfig,
    "quantization": QuantizationConfig,
    "template": TemplateConfig,
    "data": DataConfig,
    "prompts": PromptsConfig,
    "tuner": TunerConfig,
    "training": TrainingConfig,
    "deepspeed": DeepspeedConfig,
    "evaluation": EvaluationConfig,
}
"""Section of a recipe -> its dataclass."""

SECRETS = ("hub_token", "swanlab_token")
"""Keys under ``training`` that are never printed or saved. Set them as ${oc.env:NAME}."""

TOP_LEVEL = ("extends", "inherit", "global_max_length", *SECTIONS, "custom", "phases")
"""Keys at the top of a recipe file; ``inherit`` means ``extends``, ``custom`` means ``data``."""


@dataclass(kw_only=True)
class Recipe:
    """All settings of a run, typed and checked."""

    model: ModelConfig
    quantization: QuantizationConfig
    template: TemplateConfig
    data: DataConfig
    prompts: PromptsConfig
    tuner: TunerConfig
    training: TrainingConfig
    deepspeed: DeepspeedConfig
    evaluation: EvaluationConfig
    global_max_length: int | None = None
    origins: dict[str, str] = field(default_factory=dict, compare=False)
    """``section.key`` -> the file that set it, or ``override``. Keys with their default are absent."""
    phases: list["Recipe"] = field(default_factory=list)
    """The complete recipe of each phase; empty if the run has no phases."""
    phase: str = ""
    """In the recipe of a phase: its number, the number of phases and its name, for example ``2/3 medium``."""

    def to_dict(self) -> dict[str, Any]:
        """Return the sections as in a recipe file, without secrets.

        ``training`` is flat, ``global_max_length`` is present only if it was set, and a phase has only the keys in
        which it differs from the recipe around it.
        """
        sections: dict[str, Any] = {}
        if self.global_max_length is not None:
            sections["global_max_length"] = self.global_max_length
        for name, section in SECTIONS.items():
            values = {key: getattr(getattr(self, name), key) for key in field_names(section)}
            values |= values.pop("arguments", {})
            sections[name] = {key: value for key, value in values.items() if key not in SECRETS}
        if self.phases:
            sections["phases"] = [{"name": phase.phase.split()[1]} | _changes(phase, sections) for phase in self.phases]
        return sections

    def to_yaml(self) -> str:
        """Return the text of a recipe file that resolves to this recipe."""
        return OmegaConf.to_yaml(OmegaConf.create(_escaped(self.to_dict())))

    def save(self, path: str | Path) -> None:
        """Write a recipe file that resolves to this recipe, headed by the package versions that resolved it."""
        from qwenvl_ft.recipe.provenance import header

        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(".partial")
        partial.write_text(header() + self.to_yaml(), encoding="utf-8")
        partial.replace(target)

    def by_phase(self) -> "dict[str, Recipe]":
        """Return the recipe of each phase by the name of its folder; without phases, this recipe under ``""``."""
        return {Path(run.training.arguments["output_dir"]).name: run for run in self.phases} or {"": self}

    def origin(self, key: str) -> str:
        """Return where the value of a dotted key comes from: a file, ``override`` or ``default``."""
        while "." in key and key not in self.origins:
            key = key.rpartition(".")[0]
        return self.origins[key] if key in self.origins else "default"


def _changes(phase: Recipe, base: dict[str, Any]) -> dict[str, Any]:
    """Return what a phase changes in the recipe around it, except for its folders, which follow from its name."""
    changes: dict[str, Any] = {}
    for name, values in phase.to_dict().items():
        if not isinstance(values, dict):
            changes |= {name: values} if name not in base or values != base[name] else {}
            continue
        changed = {key: value for key, value in values.items() if key not in base[name] or value != base[name][key]}
        for key in ("output_dir", "logging_dir") if name == "training" else ():
            changed.pop(key, None)
        changes |= {name: changed} if changed else {}
    return changes


def _escaped(value: Any) -> Any:
    """Escape ``${`` in all texts, so that OmegaConf does not read it as an interpolation."""
    if isinstance(value, dict):
        return {key: _escaped(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_escaped(inner) for inner in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value
