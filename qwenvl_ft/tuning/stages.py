"""Continues training an adapter of an earlier run, together with new layers if the recipe names any.

``tuner.resume_from_checkpoint`` names its folder. Only the weights are read; optimizer, schedule and data start anew.
The result is one adapter with the layers of both runs, each with its own rank and scale, and the modules that either
run trained in full, so peft loads it on the base model without the earlier adapter. The earlier layers keep training
in unfrozen parts and are frozen in the others; ``tuner.modules_to_save`` train in all parts.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from torch import nn

from qwenvl_ft.errors import CheckpointError, RecipeError, one_line
from qwenvl_ft.model.anatomy import part_of
from qwenvl_ft.tuning.freeze_flags import frozen_parts
from qwenvl_ft.tuning.targets import inside

if TYPE_CHECKING:
    from qwenvl_ft.recipe.schema import TunerConfig

logger = logging.getLogger(__name__)

KEY = "tuner.resume_from_checkpoint"
ROOT = "base_model.model."
FILES = ("adapter_config.json", "adapter_model.safetensors")
FREE = {
    *("peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision"),
    *("inference_mode", "target_modules", "target_parameters", "exclude_modules", "modules_to_save"),
    *("layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "ensure_weight_tying"),
    *("total_step", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight"),
}
"""Fields of a peft config that may differ between two stages, besides dropout, initialisation, LoRA's r and alpha."""


SHARING = ("TINYLORA", "VBLORA", "VERA", "RANDLORA")
"""Adapter types whose layers share weights; another layer would change the size or values of the shared weights."""


@dataclass(frozen=True)
class Earlier:
    """The adapter of an earlier run: its config and layer names, without the weights."""

    folder: Path
    config: Any
    """peft's config of the adapter."""
    layers: list[str]
    """Full names of the modules that have an adapter."""

    @classmethod
    def of(cls, tuner: TunerConfig) -> Earlier | None:
        """Read the adapter that a recipe continues; None if it continues none.

        Raises:
            CheckpointError: the folder holds no adapter.
        """
        if not tuner.resume_from_checkpoint:
            return None
        folder = Path(tuner.resume_from_checkpoint).expanduser()
        if not all((folder / name).is_file() for name in FILES):
            raise CheckpointError(f"{KEY}={folder} {_problem_of(folder)}")
        from peft import PeftConfig
        from safetensors import SafetensorError, safe_open

        from qwenvl_ft.model.adapters import register_adapters
        from qwenvl_ft.upstream.peft import prefix_of

        register_adapters()
        try:
            config: Any = PeftConfig.from_pretrained(str(folder))
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{folder}/adapter_config.json is not a peft config: {error}") from error
        try:
            with safe_open(str(folder / "adapter_model.safetensors"), framework="pt") as opened:
                keys = list(opened.keys())
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{folder}/adapter_model.safetensors is damaged: {one_line(error)}") from error
        mark = f".{prefix_of(config.peft_type)}"
        names = (key.partition(mark)[0].removeprefix(ROOT) for key in keys if mark in key and key.startswith(ROOT))
        owners = {str(name).rpartition(".")[0] for name in getattr(config, "target_parameters", None) or []}
        layers = [name for name in names if not any(f".{name}".endswith(f".{owner}") for owner in owners)]
        return cls(folder, config, list(dict.fromkeys(name for name in layers if ".base_layer" not in name)))

    def widen(self, config: Any, model: nn.Module) -> None:
        """Extend the peft config of this run by the targets and modules of the earlier run.

        Raises:
            RecipeError: the runs differ in the method or in a setting that an adapter has only one of, or one trains
                in full what the other adapts.
        """
        self._require_same_method(config)
        current, earlier = list(config.modules_to_save or []), self.saved(model)
        new = set() if isinstance(config.target_modules, str) else set(config.target_modules or [])
        for layer in self.layers:
            if inside(layer, current):
                raise RecipeError(
                    f"tuner.modules_to_save trains {layer} in full, but {self.folder} has an adapter for it. Leave it "
                    "out, or merge that adapter first (qwenvl-ft merge) and start from the merged model."
                )
        for name in current:
            clash = [other for other in earlier if other != name and (inside(other, [name]) or inside(name, [other]))]
            if clash:
                raise RecipeError(
                    f"tuner.modules_to_save names {name}, but {self.folder} was trained with {clash[0]} in full. Name "
                    "the same modules."
                )
        wide = {name for name in new if not inside(name, earlier)} | set(self.layers)
        more = sorted(wide - set(self.layers))
        if more and self.config.peft_type.value in SHARING:
            raise RecipeError(
                f"{KEY}={self.folder} is an adapter whose layers share weights, but this recipe adds {more[0]}. Adapt "
                "the same layers, or merge it first (qwenvl-ft merge) and start from the merged model."
            )
        config.target_modules = wide or config.target_modules
        config.modules_to_save = list(dict.fromkeys([*current, *earlier])) or None
        if hasattr(config, "ensure_weight_tying"):
            config.ensure_weight_tying = config.ensure_weight_tying or self.config.ensure_weight_tying
        if config.peft_type.value == "LORA":
            weights = list(self.config.target_parameters or [])
            config.target_parameters = list(dict.fromkeys([*(config.target_parameters or []), *weights])) or None
            if config.target_parameters:
                config.lora_dropout = 0.0  # as in `build_lora`
            self._keep_sizes(config, [*self.layers, *weights])

    def load(self, peft_model: Any, tuner: TunerConfig, saved: list[str]) -> None:
        """Load the weights into a model that was built from a widened config, and freeze those of frozen parts.

        Args:
            saved: full names of ``tuner.modules_to_save``, which train in frozen parts too.

        Raises:
            CheckpointError: weights that have no place in the model, or the wrong shape.
        """
        base = peft_model.get_base_model()
        trained_on, current = self.config.base_model_name_or_path, getattr(base, "name_or_path", "")
        if trained_on and Path(trained_on).absolute() != Path(current).absolute():
            logger.warning("%s was trained on %s, and continues on %s", self.folder, trained_on, current)
        try:
            with TemporaryDirectory() as alone:  # without the state of AdaLoRA, which starts pruning afresh
                for name in FILES:
                    (Path(alone) / name).symlink_to((self.folder / name).resolve())
                result = peft_model.load_adapter(alone, peft_model.active_adapter, is_trainable=True)
        except (RuntimeError, ValueError, KeyError) as error:
            cause = one_line(error)
            raise CheckpointError(f"{KEY}={self.folder} does not fit {current}: {cause}") from error
        if result.unexpected_keys:
            raise CheckpointError(
                f"{KEY}={self.folder} does not fit {current}, which has no place for {result.unexpected_keys[0]}."
            )
        frozen = frozen_parts(tuner)
        for name, parameter in peft_model.named_parameters():
            if part_of(name) in frozen and not inside(name.removeprefix(ROOT), saved):
                parameter.requires_grad_(False)
        for name, module in peft_model.named_modules():
            if isinstance(getattr(module, "lora_dropout", None), nn.ModuleDict) and part_of(name) in frozen:
                for adapter in module.lora_dropout:
                    module.lora_dropout[adapter] = nn.Identity()

    def saved(self, model: nn.Module) -> list[str]:
        """Return the full names of the modules that the earlier run trained in full."""
        names = []
        for wanted in self.config.modules_to_save or []:
            hits = [name for name, _ in model.named_modules() if f".{name}".endswith(f".{wanted}")]
            if not hits:
                raise CheckpointError(f"{KEY}={self.folder} was trained with {wanted} in full, which the model lacks.")
            names += hits
        return names

    def _require_same_method(self, config: Any) -> None:
        if config.peft_type != self.config.peft_type:
            raise RecipeError(
                f"{KEY}={self.folder} is an adapter of type {self.config.peft_type.value}, but this recipe trains one "
                f"of type {config.peft_type.value}. Set tuner.train_type to the earlier run's."
            )
        free = FREE | ({"r", "lora_alpha"} if config.peft_type.value == "LORA" else set())
        for entry in fields(config):
            name = entry.name
            if name in free or "dropout" in name or name.startswith("init") or name.endswith("_config"):
                continue
            then, now = getattr(self.config, name), getattr(config, name)
            if then != now:
                raise RecipeError(
                    f"{KEY}={self.folder} was trained with {name}={then}, but this recipe sets {now}. An adapter has "
                    f"only one value; use {then}."
                )

    def _keep_sizes(self, config: Any, names: list[str]) -> None:
        """Add patterns that keep each earlier layer's rank and alpha, where this run's differ."""
        for field, pattern in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
            sizes = {name: _size(self.config, field, pattern, name) for name in names}
            kept = {name: size for name, size in sizes.items() if size != _size(config, field, pattern, name)}
            setattr(config, pattern, kept | getattr(config, pattern))


def _size(config: Any, field: str, pattern: str, name: str) -> Any:
    from qwenvl_ft.upstream.peft import pattern_of

    patterns = getattr(config, pattern)
    key = pattern_of(patterns, name)
    return patterns[key] if key in patterns else getattr(config, field)


def _problem_of(folder: Path) -> str:
    """Return the end of an error about a folder without an adapter."""
    if not folder.is_dir():
        return "does not exist. Set it to the folder of an adapter, such as output/stage_1."
    if (folder / "config.json").is_file():
        return f"is a whole model. Set model.model={folder} instead."
    inner = sorted(folder.glob("checkpoint-*/adapter_config.json"), key=lambda path: path.stat().st_mtime)
    return "holds no adapter." + (f" Did you mean {inner[-1].parent}?" if inner else "")
