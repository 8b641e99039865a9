"""How LoRA starts: ``tuner.init_weights`` -> what peft is told, and what is done before and after it wraps the model.

PiSSA, OLoRA and LoRA-GA start with an update that is not zero and take it out of the base weights, so that the model
computes what it did. peft's own checkpoints of them hold only the new update and fit no other model than the changed
one. Here they are saved as a plain adapter of the base model as it was, with twice the rank (`OriginalBasePeftModel`).
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qwenvl_ft.data.conversation import IGNORE
from qwenvl_ft.errors import RecipeError, unknown_name
from qwenvl_ft.tuning.methods.trained import TrainedPeftModel
from qwenvl_ft.tuning.targets import plain_start
from qwenvl_ft.upstream.peft import lora_layers, public

if TYPE_CHECKING:
    from qwenvl_ft.recipe.schema import TunerConfig

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
GA_SCALES = {"gd": "gd_scale", "unit": "unit", "stable": "stable", "weightS": "weight_svd"}
"""Name of ``lora_ga_scale`` -> peft's."""
EVA_ROUNDS = 20
"""How often eva may go through its batches before it is given up."""


@dataclass(frozen=True)
class Start:
    """One way to start; the steps are called in this order."""

    settings: Callable[[Any], dict[str, Any]]
    """(tuner) -> fields of LoraConfig."""
    prepare: Callable[[nn.Module, Any], None] = lambda model, config: None
    """(model, config), before the model is wrapped."""
    finish: Callable[[Any], Any] = lambda wrapped: wrapped
    """(PeftModel) -> the same, started."""
    kind: Any = None
    """The class of the PeftModel; None is peft's own."""


def check_sizes(tuner: TunerConfig, sizes: dict[str, tuple[int, int]]) -> None:
    """Refuse ranks beyond what a start can take out of a layer's weight.

    Args:
        sizes: target -> its rank, and the smaller side of its weight.

    Raises:
        RecipeError: names the layer.
    """
    if not tuner.changes_base:
        return
    start = tuner.init_weights
    share = 2 if start == "lora-ga" else 1  # it takes 2 r singular vectors
    for name, (rank, side) in sizes.items():
        if share * rank > side:
            raise RecipeError(
                f"tuner.init_weights={start} with rank {rank} takes {share * rank} directions out of {name}, which has "
                f"{side}. Lower tuner.lora_rank, or give that layer less by tuner.rank_pattern."
            )


def wants_data(tuner: TunerConfig) -> bool:
    """Whether a recipe's start looks at batches."""
    return tuner.train_type in ("lora", "longlora") and tuner.init_weights in ("lora-ga", "eva")


def start_of(tuner: TunerConfig, batches: Any = None) -> Start:
    """The start that ``tuner.init_weights`` names.

    Args:
        batches: a list of batches as the collator makes them, for lora-ga and eva.

    Raises:
        RecipeError: an unknown name, no batches where they are needed, or settings that exclude one another.
    """
    plain = str(tuner.init_weights).lower()
    if plain_start(tuner):
        told = {"true": True, "false": False}.get(plain, plain)
        return Start(lambda tuner: {"init_lora_weights": told})
    changed = OriginalBasePeftModel
    if plain in ("pissa", "olora") or re.fullmatch(r"pissa_niter_[1-9]\d*", plain):
        return Start(lambda tuner: {"init_lora_weights": plain}, finish=_remember, kind=changed)
    if plain == "loftq":
        return Start(lambda tuner: {"init_lora_weights": True}, finish=_loftq)
    if plain not in ("lora-ga", "eva"):
        known = ("true", "false", "gaussian", "pissa", "pissa_niter_N", "olora", "loftq", "lora-ga", "eva")
        raise unknown_name("tuner.init_weights", plain, known)
    if not batches:
        raise RecipeError(
            f"tuner.init_weights={plain} looks at data: prepare_model(model, tuner, batches=[...]) takes batches of "
            "the collator. A run of a recipe makes them itself."
        )
    if plain == "eva":
        return Start(_eva_settings, finish=lambda wrapped: _eva(wrapped, batches))
    return Start(_ga_settings, lambda model, config: _ga_gradients(model, config, batches), _remember, changed)


# -- LoRA-GA (arXiv 2407.05000) and EVA (arXiv 2410.07170): starts that look at data -----------------------------------


def _ga_settings(tuner: TunerConfig) -> dict[str, Any]:
    scale: Any = GA_SCALES[tuner.lora_ga_scale]
    told = public("LoraGAConfig", "tuner.init_weights=lora-ga", "lora-ga")(
        tuner.lora_ga_direction, scale, tuner.lora_ga_stable_gamma
    )
    return {"init_lora_weights": "lora_ga", "lora_ga_config": told}


def _ga_gradients(model: nn.Module, config: Any, batches: Any) -> None:
    """The mean gradient of each target over the batches, each of them the mean over its supervised tokens."""
    preprocess: Any = public("preprocess_loraga", "tuner.init_weights=lora-ga", "lora-ga")

    def passes() -> None:
        for batch in batches:
            told = _on_device(batch, model)
            targets = told.pop("labels")[0, 1:]
            kept = (targets != IGNORE).nonzero(as_tuple=True)[0]
            logits = model(**told, logits_to_keep=kept).logits[0].float()
            nn.functional.cross_entropy(logits, targets[kept]).backward()

    with warnings.catch_warnings():  # torch says that the first layers' inputs have no gradient, as they should not
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        preprocess(model, config, passes)


def _eva_settings(tuner: TunerConfig) -> dict[str, Any]:
    from peft import EvaConfig

    if tuner.eva_rho < 1:
        raise RecipeError(f"tuner.eva_rho={tuner.eva_rho} is below 1, which keeps all ranks equal.")
    return {"init_lora_weights": "eva", "eva_config": EvaConfig(rho=tuner.eva_rho)}


def _eva(wrapped: Any, batches: Any) -> Any:
    """A from the main directions of each layer's inputs; ranks go to the layers whose inputs they explain best."""
    from peft import initialize_lora_eva_weights

    calls = 0

    def forward(model: nn.Module, batch: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > EVA_ROUNDS * len(batches) + 1:
            raise RecipeError(
                f"tuner.init_weights=eva did not settle in {EVA_ROUNDS} rounds over {len(batches)} batches. Raise "
                "tuner.eva_batch_size, or lower tuner.lora_rank or eva_rho: a layer needs more tokens than ranks."
            )
        return model(**{key: value for key, value in batch.items() if key != "labels"})

    initialize_lora_eva_weights(
        wrapped,
        [_on_device(batch, wrapped) for batch in batches],
        forward_fn=forward,
        prepare_model_inputs_fn=lambda inputs, config: None,
        prepare_layer_inputs_fn=lambda states, inputs, name: _rows(states),
        gather_distributed_inputs=False,  # every process sees the same batches
        show_progress_bar=False,
    )
    return wrapped


def _rows(states: Any) -> Tensor:
    """A layer's inputs as ``[tokens, features]``, whatever the part of the model."""
    first = states if isinstance(states, Tensor) else states[0]
    return first.reshape(-1, first.shape[-1])


def _on_device(batch: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    device = next(model.parameters()).device
    moved = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
    return {key: value for key, value in moved.items() if key not in ("sources", "faults")}


# -- PiSSA (arXiv 2404.02948), OLoRA (arXiv 2406.01775) and LoRA-GA: starts that change the base model -----------------


def _remember(wrapped: OriginalBasePeftModel) -> OriginalBasePeftModel:
    wrapped.remember()
    return wrapped


class OriginalBasePeftModel(TrainedPeftModel):
    """A PeftModel whose base weights were changed at the start, saved as an adapter of the base as it was.

    The base holds ``W - s B0 A0``. With ``A = [A1; A0]`` and ``B = [B1, -B0]`` the update ``s B A`` of W is the same,
    so a checkpoint has twice the rank, and plain peft loads it on the original model.
    """

    start: dict[str, Tensor]
    """Key in the checkpoint -> A0 or B0, on the CPU."""

    def remember(self) -> None:
        """Keep the start as it is now."""
        from peft import get_peft_model_state_dict

        state = get_peft_model_state_dict(self)
        self.start = {key: value.detach().cpu().clone() for key, value in state.items() if _is_factor(key)}

    def hold_in(self, dtype: torch.dtype) -> None:
        """As for any LoRA; what the rounding took from the start goes back into the base weights."""
        from peft import get_peft_model_state_dict

        self.remember()
        super().hold_in(dtype)
        state = get_peft_model_state_dict(self)
        self._move_base({key: state[key].detach().cpu().clone() for key in self.start})

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        from safetensors.torch import load_file, save_file

        super().save_pretrained(save_directory, *args, **kwargs)
        if not kwargs.get("is_main_process", True):
            return
        folder = Path(str(save_directory))
        state = load_file(folder / WEIGHTS)
        for key, value in state.items():
            if key in self.start:
                first = self.start[key].to(value.dtype)
                joined = (value, first) if ".lora_A." in key else (value, -first)
                state[key] = torch.cat(joined, dim=0 if ".lora_A." in key else 1).contiguous()
        save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
        told = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        (folder / CONFIG).write_text(json.dumps(_twice(told), indent=2, sort_keys=True), encoding="utf-8")

    def restore(self, folder: Path, adapter_name: str) -> Any:
        from peft.utils import load_peft_weights, set_peft_model_state_dict

        trained, start = {}, {}
        for key, value in load_peft_weights(str(folder), device="cpu").items():
            if key not in self.start:
                trained[key] = value
                continue
            axis = 0 if ".lora_A." in key else 1
            if value.shape[axis] != 2 * self.start[key].shape[axis]:
                raise RecipeError(
                    f"{folder} has rank {value.shape[axis] // 2} at {key}, but tuner.lora_rank makes "
                    f"{self.start[key].shape[axis]}. Resume with the settings that it was trained with."
                )
            trained[key], first = value.chunk(2, dim=axis)
            start[key] = (first if axis == 0 else -first).contiguous().to(self.start[key].dtype)
        self._move_base(start)
        return set_peft_model_state_dict(self, trained, adapter_name=adapter_name)

    def _move_base(self, start: dict[str, Tensor]) -> None:
        """Take another start out of the base weights; the same one, which a seed gives, leaves every bit."""
        for key, first in start.items():
            if ".lora_A." not in key:
                continue
            other = key.replace(".lora_A.", ".lora_B.")
            same = all(torch.equal(start[name].float(), self.start[name].float()) for name in (key, other))
            if same:
                continue
            layer: Any = self.get_submodule(key.partition(".lora_A.")[0])
            weight = layer.get_base_layer().weight
            delta = self.start[other].float() @ self.start[key].float() - start[other].float() @ first.float()
            with torch.no_grad():
                moved = weight.float() + layer.scaling[self.active_adapter] * delta.to(weight.device)
                weight.copy_(moved.to(weight.dtype))
        self.start |= start


def _is_factor(key: str) -> bool:
    return ".lora_A." in key or ".lora_B." in key


def _twice(told: dict[str, Any]) -> dict[str, Any]:
    """adapter_config.json for twice the rank at the same scale, with no start of its own."""
    growth = math.sqrt(2) if told["use_rslora"] else 2
    told |= {"init_lora_weights": True, "lora_ga_config": None, "r": 2 * told["r"]}
    told["lora_alpha"] *= growth
    told["rank_pattern"] = {key: 2 * rank for key, rank in told["rank_pattern"].items()}
    told["alpha_pattern"] = {key: growth * alpha for key, alpha in told["alpha_pattern"].items()}
    return told


# -- LoftQ (arXiv 2310.08659): a start that makes up for what quantisation lost ----------------------------------------


@torch.no_grad()
def _loftq(wrapped: Any) -> Any:
    """Let the update of each 4-bit layer be what quantisation took, as far as the rank goes: ``s B A ~ W - Q``.

    peft's own does this on CUDA only and forgets the scale s.
    """
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    read = _original_weights(wrapped)
    found = 0
    module: Any
    for name, module in lora_layers(wrapped):
        if not isinstance(module.get_base_layer(), Linear4bit):
            continue
        quantised: Any = module.get_base_layer().weight
        whole = read(f"{name.removeprefix('base_model.model.')}.weight").float().to(quantised.device)
        if whole.shape != (module.out_features, module.in_features):
            raise RecipeError(
                "tuner.init_weights=loftq makes up for what quantisation took, and the model is quantised on the disk "
                "already. Give the model in 16 bits as model.model, with quantization.quantization_bit=4."
            )
        lost = whole - dequantize_4bit(quantised.data, quantised.quant_state).float()
        for adapter, rank in module.r.items():
            left, sizes, right = torch.linalg.svd(lost, full_matrices=False)
            roots = (sizes[:rank] / module.scaling[adapter]).sqrt()
            factors: Any = module.lora_A[adapter], module.lora_B[adapter]
            factors[0].weight.copy_(roots[:, None] * right[:rank])
            factors[1].weight.copy_(left[:, :rank] * roots)
        found += 1
    if not found:
        raise RecipeError("tuner.init_weights=loftq makes up for quantisation, and no adapted layer is 4-bit.")
    return wrapped


def _original_weights(wrapped: Any) -> Callable[[str], Tensor]:
    """A reader of the base model's weights as they are on the disk, by name."""
    from safetensors import safe_open
    from transformers.utils import cached_file

    source = wrapped.get_base_model().name_or_path
    try:
        index = cached_file(source, "model.safetensors.index.json")
    except OSError:  # one file holds all weights
        index = None
    shards = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"] if index else None

    def read(name: str) -> Tensor:
        file = cached_file(source, shards[name] if shards else "model.safetensors")
        with safe_open(str(file), framework="pt") as opened:
            return opened.get_tensor(name)

    return read
