"""Registers this package's adapter types with peft, and wraps the internals of peft that the package uses.

| relies on | form in peft 0.17.1 to 0.21.2 | if it is missing |
|---|---|---|
| the tables of `peft.mapping`, which we extend | the same in all; none has a public way to add a type | RecipeError |
| members of the enumeration `PeftType` | up to 0.20, a type must be a member to be saved | nothing is added |
| ``BaseTuner.forward`` | up to 0.20 it calls the model's forward, without hooks | ours calls the model |
| ``BaseTuner._create_and_replace``, ``_replace_module`` | its docstring says that tuners override them; 0.17 | |
| | has no ``_replace_module`` in the base class | ours runs and does not need peft's |
| `peft.utils.other.get_pattern_key` | the same in all | ImportError if patterns are used |
| `peft.utils.constants.DUMMY_TARGET_MODULES` | the same in all | RecipeError by peft: no target |
| `ParamWrapper` of LoRA, for weights outside of layers | since 0.17 | no layer counts as one |
| its sight of a weight's whole shape under ZeRO-3 | 0.21 | RecipeError |
| peft without bitsandbytes | imported by all to wrap with LoRA, and at once since 0.20 | it is imported |

peft 0.17 cannot be imported with transformers 5, so 0.18.0 is the oldest usable version.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from qwenvl_ft.errors import RecipeError
from qwenvl_ft.upstream.probe import Feature, lacks

BITS = "bitsandbytes"
SINCE = {
    **dict.fromkeys(("ADAMSS", "LILY", "PVERA", "GRALORA", "TINYLORA", "PSOFT", "PEANUT", "lora-ga"), "0.19.0"),
    **dict.fromkeys(("BEFT", "FROD", "GLORA", "UNILORA", "HIRA", "DEFT"), "0.20.0"),
    **dict.fromkeys(("SHADOW", "SUPERTUNING"), "0.21.0"),
}
"""peft's name of a method, or our name of an initialisation -> the first release with it. All others are in 0.18.0."""


@contextmanager
def without_bitsandbytes() -> Iterator[None]:
    """Make peft believe that bitsandbytes is not installed, unless it is imported already.

    peft imports it wherever it is installed, which takes a second and prints warnings about missing libraries. No layer
    can be one of bitsandbytes' unless that was imported, so nothing is lost. A package whose entry in ``sys.modules``
    is None cannot be imported. peft caches the answer; the cache is cleared on exit.
    """
    if BITS in sys.modules:
        yield
        return
    sys.modules[BITS] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[BITS]
        import_utils = sys.modules["peft.import_utils"] if "peft.import_utils" in sys.modules else None
        for name in ("is_bnb_available", "is_bnb_4bit_available"):
            function: Any = getattr(import_utils, name, None)
            if hasattr(function, "cache_clear"):
                function.cache_clear()


with without_bitsandbytes():
    import peft
    from peft import PeftConfig as PeftConfig
    from peft import PeftModelForCausalLM as PeftModelForCausalLM
    from peft.tuners.tuners_utils import BaseTuner
    from peft.tuners.tuners_utils import BaseTunerLayer as BaseTunerLayer


def register_type(kind: str, config: type, tuner: type) -> None:
    """Register an adapter type of this package with peft.

    Args:
        kind: its ``peft_type``.
        config: its config class.
        tuner: its tuner class.

    Raises:
        RecipeError: the installed peft would not call the tuner, or has no table to extend.
    """
    OWN_TYPES.require(f"an adapter of type {kind}")
    for table, value in (("CONFIG", config), ("TUNER", tuner), ("PREFIX", tuner.prefix)):  # type: ignore[attr-defined]
        _table(table)[kind] = value
    try:
        peft.get_peft_model_state_dict(_Asking(kind), state_dict={}, adapter_name="")  # type: ignore[arg-type]
    except ValueError:  # "Unknown PEFT type"
        _name_type(kind)
    except Exception:  # peft accepted the type, and then failed on an attribute that `_Asking` lacks
        pass


class _Asking:
    """The attributes of a PeftModel that peft reads before it rejects an unknown type."""

    def __init__(self, kind: str) -> None:
        self.peft_config = {"": SimpleNamespace(peft_type=kind, is_prompt_learning=False)}


def _name_type(kind: str) -> None:
    """Add a member to peft's enumeration of types; up to 0.20, peft does not save an adapter without it."""
    types: Any = peft.PeftType
    if kind not in types.__members__:
        member = str.__new__(types, kind)
        member._name_ = member._value_ = kind
        types._member_names_.append(kind)
        types._member_map_[kind] = types._value2member_map_[kind] = member


def config_class_of(name: str, key: str) -> Any:
    """Return peft's config class of a method.

    Args:
        name: peft's name of the method, in capitals.
        key: the recipe key that selects it, for the error.

    Raises:
        RecipeError: the installed peft does not have the method.
    """
    require(name, key, name in {str(getattr(kind, "value", kind)) for kind in _table("CONFIG")})
    return next(value for kind, value in _table("CONFIG").items() if str(getattr(kind, "value", kind)) == name)


def require(name: str, key: str, available: bool) -> None:
    """Raise RecipeError with the release to install (see ``SINCE``), unless ``name`` is available."""
    if not available:
        fix = f"pip install 'peft>={SINCE[name]}'" if name in SINCE else "install peft 0.21.2"
        raise RecipeError(f"{key} is not in peft {peft.__version__}. To use it, {fix}.")


def public(name: str, key: str, feature: str) -> Any:
    """Return ``peft.<name>``.

    Args:
        key: the recipe key that needs it, for the error.
        feature: a key of ``SINCE``.

    Raises:
        RecipeError: the installed peft does not have it.
    """
    require(feature, key, hasattr(peft, name))
    return getattr(peft, name)


def prefix_of(kind: Any) -> str:
    """Return the prefix of an adapter type's weights, such as ``lora_``."""
    return str(_table("PREFIX")[kind])


def tuner_of(kind: Any) -> Any:
    """Return the tuner class of an adapter type; None for types without one."""
    return _table("TUNER").get(kind)


def pattern_of(patterns: Any, name: str) -> str:
    """Return the first of ``patterns`` that a module's full name ends with, by peft's rule for ranks; else the name."""
    from peft.utils.other import get_pattern_key

    return str(get_pattern_key(list(patterns), name))


def no_target() -> str:
    """Return the target name that peft accepts although it matches nothing; peft rejects an empty list."""
    from peft.utils.constants import DUMMY_TARGET_MODULES

    return DUMMY_TARGET_MODULES


def is_full_copy(module: Any) -> bool:
    """Return True for peft's wrapper that holds an original module and its trainable copy (``modules_to_save``)."""
    from peft.utils import ModulesToSaveWrapper

    return isinstance(module, ModulesToSaveWrapper)


def is_adapted(module: Any) -> bool:
    """Return True for a module of the base model that is wrapped by an adapter of any type."""
    return isinstance(module, BaseTunerLayer)


def lora_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield (name, layer) of the layers wrapped by LoRA, except wrappers of single weights, such as experts."""
    from peft.tuners.lora import LoraLayer

    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and not isinstance(module, _single_weights()):
            yield name, module


def gather_as_one(model: Any) -> None:
    """Let ZeRO-3 gather all weights in a wrapper of single weights when the wrapper's forward begins.

    The wrapper itself computes with its LoRA weights and the wrapped weight, before it calls the modules that own them;
    ZeRO-3 gathers a module's weights for that module's own forward only. DeepSpeed's public name for a module whose
    weights are gathered with those of all modules inside is a leaf. DeepSpeed (0.19) takes a leaf's gradients for
    complete when the gradient of its inputs is, or at once if no input needs one. So that this comes last in the first
    layer too, the embeddings' output needs a gradient.

    Raises:
        RecipeError: the installed peft takes the shape of a partitioned weight for that of the whole.
    """
    from deepspeed.utils import set_z3_leaf_module

    PARTITIONED.require("an adapter of experts or routers under ZeRO-3 (tuner.target_parameters=[] leaves them out)")
    for module in model.modules():
        if isinstance(module, _single_weights()):
            set_z3_leaf_module(module, True)
    model.enable_input_require_grads()


def load_onto(model: Any, folder: str, adapter_name: str) -> Any:
    """Load a saved adapter onto a model, and return the PeftModel; a PeftModel gets one more adapter."""
    with without_bitsandbytes():
        if not isinstance(model, peft.PeftModel):
            return peft.PeftModel.from_pretrained(model, folder, adapter_name=adapter_name)
        model.load_adapter(folder, adapter_name)
        return model


def unmatched(model: Any, folder: str, adapter_name: str) -> tuple[list[str], list[str]]:
    """Compare an adapter's folder with the model that it was loaded onto; peft itself only warns.

    Returns:
        Names of weights that the folder lacks (saving the adapter would write them), and names of weights in the folder
        for which the model has no place.
    """
    from peft.utils import load_peft_weights

    # Parts of names that peft omits in the file, or omitted in earlier releases.
    omitted = re.compile(rf"(\.modules_to_save)?\.{re.escape(adapter_name)}(?=\.|$)|\.weight$")
    saved = load_peft_weights(folder, device="cpu")
    written = peft.get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    # For types that it does not know, peft up to 0.20 returns the weights of every adapter.
    others = [re.compile(rf"\.{re.escape(name)}(\.|$)") for name in model.peft_config if name != adapter_name]
    written = [key for key in written if not any(other.search(key) for other in others)]
    found = {omitted.sub("", key) for key in saved}
    known = {omitted.sub("", key) for key in [*model.state_dict(), *written]}
    missing = sorted(key for key in written if omitted.sub("", key) not in found)
    return missing, sorted(key for key in saved if omitted.sub("", key) not in known)


class WrappingTuner(BaseTuner):
    """Base class of tuners that wrap each target module; subclasses implement `wrapped` only.

    The wrapper's weights are moved to the device of the wrapped module.
    """

    target_module_mapping: dict[str, Any] = {}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model with its hooks, which peft up to 0.20 bypasses."""
        return self.model(*args, **kwargs)

    def wrapped(self, module: nn.Module, adapter_name: str, config: Any) -> nn.Module:
        """Return ``module``, wrapped unless it is a wrapper already, with the weights of a new adapter."""
        raise NotImplementedError

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        layer = self.wrapped(target, adapter_name, peft_config)
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """Replace a module by its wrapper. peft's own method needs ``child.weight``, which a block of layers lacks."""
        setattr(parent, child_name, new_module)
        device = next(iter(child.parameters())).device
        for name, module in new_module.named_modules():
            if self.prefix in name and not any(value.is_meta for value in module.parameters()):
                module.to(device)


OWN_TYPES = Feature(
    name="an adapter type defined by this package",
    packages=("peft",),
    missing=lambda: lacks(BaseTuner, ("_create_and_replace",)),
)


def _single_weights() -> Any:
    """Return LoRA's wrapper of a weight outside of Linear layers; () if peft has none."""
    return getattr(import_module("peft.tuners.lora.layer"), "ParamWrapper", ())


def _no_whole_shape() -> str:
    """Return why LoRA cannot wrap a weight that ZeRO-3 has partitioned; empty if it can."""
    holder: Any = nn.Module()
    holder.weight = nn.Parameter(torch.empty(0))
    holder.weight.ds_shape = (2, 4, 6)
    try:
        layer = _single_weights()(holder, "probe", "weight", config=peft.LoraConfig(r=1), r=1)
        found = layer.lora_A["probe"].weight.shape, layer.lora_B["probe"].weight.shape
    except Exception as error:  # releases fail in various ways
        return f"takes its shape for the whole ({type(error).__name__})"
    return "" if found == ((2, 6), (4, 2)) else f"sees the shapes {found}"


PARTITIONED = Feature(
    name="LoRA of a weight that ZeRO-3 has partitioned",
    packages=("peft",),
    missing=_no_whole_shape,
)
FEATURES = (OWN_TYPES, PARTITIONED)


def _table(kind: str) -> dict[Any, Any]:
    """Return one of peft's tables of adapter types: CONFIG, TUNER or PREFIX."""
    name = f"PEFT_TYPE_TO_{kind}_MAPPING"
    for module in (import_module("peft.mapping"), peft):
        if hasattr(module, name):
            found: dict[Any, Any] = getattr(module, name)
            return found
    raise RecipeError(f"peft {peft.__version__} has no table {name}, which this package needs. Install peft 0.21.2.")
