"""What we take from peft beyond its documented use: importing it lightly, tables of types, the base of a tuner, names.

| borrowed | shape, read in peft 0.17.1 to 0.21.2 | where it is missing |
|---|---|---|
| the tables of `peft.mapping`, written to | the same in all; no way to add a type of one's own in any | RecipeError |
| members of the enumeration `PeftType` | up to 0.20 no type outside of it can be saved | nothing is added |
| ``BaseTuner.forward`` | up to 0.20 it calls the model's forward, without hooks | ours calls the model |
| ``BaseTuner._create_and_replace``, ``_replace_module`` | to be overridden by a tuner, as its docstring says; 0.17 | |
| | has no ``_replace_module`` in the base class | ours runs: it needs none of peft's |
| `peft.utils.other.get_pattern_key` | the same in all | ImportError where patterns are used |
| `peft.utils.constants.DUMMY_TARGET_MODULES` | the same in all | RecipeError by peft: no target |
| `ParamWrapper` of LoRA, for weights outside of layers | since 0.17 | no layer counts as one |
| peft without bitsandbytes | 0.20 and later import it at once, all of them to wrap by LoRA | it is imported |

peft 0.17 does not import with transformers 5: 0.18.0 is the oldest that can be used.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import SimpleNamespace
from typing import Any

from torch import nn

from qwenvl_ft.errors import RecipeError
from qwenvl_ft.upstream.probe import Feature, lacks

BITS = "bitsandbytes"
SINCE = {
    **dict.fromkeys(("ADAMSS", "LILY", "PVERA", "GRALORA", "TINYLORA", "PSOFT", "PEANUT", "lora-ga"), "0.19.0"),
    **dict.fromkeys(("BEFT", "FROD", "GLORA", "UNILORA", "HIRA", "DEFT"), "0.20.0"),
    **dict.fromkeys(("SHADOW", "SUPERTUNING"), "0.21.0"),
}
"""peft's name of a method, or our name of a start -> the first release that has it; the others are in 0.18.0."""


@contextmanager
def without_bitsandbytes() -> Iterator[None]:
    """Let peft believe that bitsandbytes is not installed, unless it is in use already.

    peft imports it wherever it is installed, which takes a second and prints of missing libraries. A layer can only be
    one of bitsandbytes' if that was imported, so there is nothing to miss. Python says that a package whose entry in
    ``sys.modules`` is None cannot be imported; what peft remembers of the answer is cleared.
    """
    if BITS in sys.modules:
        yield
        return
    sys.modules[BITS] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[BITS]
        asked = sys.modules["peft.import_utils"] if "peft.import_utils" in sys.modules else None
        for name in ("is_bnb_available", "is_bnb_4bit_available"):
            answer: Any = getattr(asked, name, None)
            if hasattr(answer, "cache_clear"):
                answer.cache_clear()


with without_bitsandbytes():
    import peft
    from peft import PeftConfig as PeftConfig
    from peft import PeftModelForCausalLM as PeftModelForCausalLM
    from peft.tuners.tuners_utils import BaseTuner
    from peft.tuners.tuners_utils import BaseTunerLayer as BaseTunerLayer


def register_type(kind: str, config: type, tuner: type) -> None:
    """Make an adapter type of our own known to peft, by its ``peft_type``.

    Raises:
        RecipeError: the installed peft would not ask its tuner, or has no table to be written into.
    """
    OWN_TYPES.require(f"an adapter of type {kind}")
    for table, value in (("CONFIG", config), ("TUNER", tuner), ("PREFIX", tuner.prefix)):  # type: ignore[attr-defined]
        _table(table)[kind] = value
    try:
        peft.get_peft_model_state_dict(_Asking(kind), state_dict={}, adapter_name="")  # type: ignore[arg-type]
    except ValueError:  # "Unknown PEFT type"
        _name_type(kind)
    except Exception:  # it went on to what a model has and this has not
        pass


class _Asking:
    """As much of a PeftModel as peft looks at before it refuses a type."""

    def __init__(self, kind: str) -> None:
        self.peft_config = {"": SimpleNamespace(peft_type=kind, is_prompt_learning=False)}


def _name_type(kind: str) -> None:
    """Add a member to peft's enumeration of types, without which peft up to 0.20 does not save an adapter."""
    types: Any = peft.PeftType
    if kind not in types.__members__:
        member = str.__new__(types, kind)
        member._name_ = member._value_ = kind
        types._member_names_.append(kind)
        types._member_map_[kind] = types._value2member_map_[kind] = member


def config_class_of(name: str, key: str) -> Any:
    """peft's config class of a method.

    Args:
        name: of the method in peft, in capitals.
        key: the setting that asks for it, for the error.

    Raises:
        RecipeError: the installed peft does not have the method.
    """
    require(name, key, name in {str(getattr(kind, "value", kind)) for kind in _table("CONFIG")})
    return next(value for kind, value in _table("CONFIG").items() if str(getattr(kind, "value", kind)) == name)


def require(name: str, key: str, there: bool) -> None:
    """Raises RecipeError with the release to install, unless the installed peft has ``name``: see ``SINCE``."""
    if not there:
        fix = f"pip install 'peft>={SINCE[name]}'" if name in SINCE else "install peft 0.21.2"
        raise RecipeError(f"{key} is not in peft {peft.__version__}. To use it, {fix}.")


def public(name: str, key: str, feature: str) -> Any:
    """``peft.<name>``.

    Raises:
        RecipeError: the installed peft does not have it.
    """
    require(feature, key, hasattr(peft, name))
    return getattr(peft, name)


def prefix_of(kind: Any) -> str:
    """How the names of an adapter type's own weights begin, as ``lora_``."""
    return str(_table("PREFIX")[kind])


def tuner_of(kind: Any) -> Any:
    """The tuner class of an adapter type; None for types that have none."""
    return _table("TUNER").get(kind)


def pattern_of(patterns: Any, name: str) -> str:
    """The first of ``patterns`` that a module's full name ends with, as peft looks ranks up; else the name."""
    from peft.utils.other import get_pattern_key

    return str(get_pattern_key(list(patterns), name))


def no_target() -> str:
    """The one target that peft lets match nothing; it refuses an empty list."""
    from peft.utils.constants import DUMMY_TARGET_MODULES

    return DUMMY_TARGET_MODULES


def is_full_copy(module: Any) -> bool:
    """Whether a module is the pair of an original and the copy of it that trains."""
    from peft.utils import ModulesToSaveWrapper

    return isinstance(module, ModulesToSaveWrapper)


def is_adapted(module: Any) -> bool:
    """Whether a module is one of the base model's with an adapter of any type around it."""
    return isinstance(module, BaseTunerLayer)


def lora_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Layers with LoRA around them, by name; not those of single weights, as of experts."""
    from peft.tuners.lora import LoraLayer

    single = getattr(import_module("peft.tuners.lora.layer"), "ParamWrapper", ())
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and not isinstance(module, single):
            yield name, module


def load_onto(model: Any, folder: str, adapter_name: str) -> Any:
    """The PeftModel of a model with a saved adapter; of a PeftModel, itself with one more."""
    with without_bitsandbytes():
        if not isinstance(model, peft.PeftModel):
            return peft.PeftModel.from_pretrained(model, folder, adapter_name=adapter_name)
        model.load_adapter(folder, adapter_name)
        return model


def unmatched(model: Any, folder: str, adapter_name: str) -> tuple[list[str], list[str]]:
    """Names of weights that an adapter's folder lacks, and of those for which the loaded model has no place.

    The first is what saving the adapter would write and the folder does not have. peft only warns of it.
    """
    from peft.utils import load_peft_weights

    # What peft leaves out of names in the file, or did in earlier releases.
    own = re.compile(rf"(\.modules_to_save)?\.{re.escape(adapter_name)}(?=\.|$)|\.weight$")
    saved = load_peft_weights(folder, device="cpu")
    written = peft.get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    # Of types that it does not know, peft up to 0.20 gives the weights of every adapter.
    others = [re.compile(rf"\.{re.escape(name)}(\.|$)") for name in model.peft_config if name != adapter_name]
    written = [key for key in written if not any(other.search(key) for other in others)]
    there = {own.sub("", key) for key in saved}
    known = {own.sub("", key) for key in [*model.state_dict(), *written]}
    missing = sorted(key for key in written if own.sub("", key) not in there)
    return missing, sorted(key for key in saved if own.sub("", key) not in known)


class WrappingTuner(BaseTuner):
    """A tuner that puts a module of ours around each target; `wrapped` is all that it needs to have.

    The wrapper's weights go to the device of what it wraps.
    """

    target_module_mapping: dict[str, Any] = {}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """By the model's ``__call__``, with its hooks, which peft up to 0.20 leaves out."""
        return self.model(*args, **kwargs)

    def wrapped(self, module: nn.Module, adapter_name: str, config: Any) -> nn.Module:
        """``module`` with the weights of an adapter; it may have a wrapper of ours around it already."""
        raise NotImplementedError

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        *told: Any,
        **more: Any,
    ) -> None:
        layer = self.wrapped(target, adapter_name, peft_config)
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """peft's own hands the child's weight on, which a module of several layers does not have."""
        setattr(parent, child_name, new_module)
        place = next(iter(child.parameters())).device
        for name, module in new_module.named_modules():
            if self.prefix in name and not any(value.is_meta for value in module.parameters()):
                module.to(place)


OWN_TYPES = Feature(
    name="a tuner of this package's own",
    packages=("peft",),
    missing=lambda: lacks(BaseTuner, ("_create_and_replace",)),
    instead="",
)
FEATURES = (OWN_TYPES,)


def _table(what: str) -> dict[Any, Any]:
    """One of peft's tables of adapter types: CONFIG, TUNER or PREFIX."""
    name = f"PEFT_TYPE_TO_{what}_MAPPING"
    for place in (import_module("peft.mapping"), peft):
        if hasattr(place, name):
            found: dict[Any, Any] = getattr(place, name)
            return found
    raise RecipeError(f"peft {peft.__version__} keeps no table {name}, which this package reads. Install peft 0.21.2.")
