"""Every train type on the installed versions: one step, frozen weights, and a checkpoint that plain libraries load.

What the installed peft does not have yet is refused in one line that names the release to install.
"""

import copy
import re

import peft
import pytest
import torch
from methods_table import CASES
from transformers import AutoModelForImageTextToText

from qwenvl_ft.data.collate import QwenVLCollator
from qwenvl_ft.errors import RecipeError
from qwenvl_ft.model.adapters import register_adapters
from qwenvl_ft.model.load import load_model
from qwenvl_ft.recipe.schema import TunerConfig
from qwenvl_ft.training.loss import loss_sum, split_labels
from qwenvl_ft.tuning.methods import METHODS
from qwenvl_ft.tuning.methods.trained import TrainedPeftModel
from qwenvl_ft.tuning.optimizer import param_groups
from qwenvl_ft.tuning.prepare import prepare_model
from qwenvl_ft.upstream.experts import experts_implementation

LEFT_OUT = (
    *("full, GaLore", "full, LISA", "lora, LoRA+", "lora, lora_dtype", "lora, dropout", "lora, rank_pattern"),
    *("init_weights: gaussian", "init_weights: pissa_niter_4", "boft, blocks", "bone, bat", "pissa and use_dora"),
)
"""Rows of the table of methods that differ from others only in the training loop or in a number."""
FAMILIES = {name: case.tuner for name, case in CASES.items() if case.bits == "whole" and name not in LEFT_OUT}
ON_EXPERTS = ("lora", "lora, router too", "full")
"""Rows that run on a MoE model too."""


def settings(name):
    """Return a row's settings, with nothing frozen unless the row freezes it."""
    common = {"freeze_llm": False, "freeze_vit": False, "freeze_aligner": False, "lora_dropout": 0.0}
    few = {"target_modules": ["q_proj"], "lora_rank": 2} if needs_data(name) else {}  # the batches have few tokens
    return TunerConfig(**(common | few | FAMILIES[name]))


@pytest.fixture(scope="module")
def bases(checkpoints):
    """Return a model of each architecture, to copy."""
    return {
        kind: load_model(folder, torch_dtype="float32", attn_impl="sdpa").eval() for kind, folder in checkpoints.items()
    }


@pytest.fixture(scope="module")
def rows(encoder, mixed_records):
    return [QwenVLCollator()([encoder(mixed_records[index]) for index in some]) for some in ((0, 1), (2,))]


@pytest.fixture(scope="module")
def asked(processor, mixed_records):
    """Return a conversation with an image in plain transformers' form."""
    content = [{"type": "image", "image": mixed_records[0]["image"][0]}, {"type": "text", "text": "What is it?"}]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    return dict(processor.apply_chat_template([{"role": "user", "content": content}], **options))


def prepared(base, name, rows):
    """Return a prepared copy of a model, or the reason why it was refused."""
    torch.manual_seed(0)
    try:
        return prepare_model(copy.deepcopy(base), settings(name), **({"batches": rows} if needs_data(name) else {})), ""
    except RecipeError as error:
        return None, str(error)


def logits(model, asked):
    with torch.no_grad():
        return model.eval()(**asked).logits


def stepped(model, rows):
    """Take two steps; return the weights that changed, and those that should."""
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    wanted = {name for name, value in model.named_parameters() if value.requires_grad}
    if isinstance(model, TrainedPeftModel):
        model.begin(10)
    optimizer = torch.optim.AdamW(param_groups(model.train(), learning_rate=1e-2), weight_decay=0.0)
    for step in (1, 2):
        for row in rows:
            loss_sum(model, split_labels(row)).backward()
        optimizer.step()
        if isinstance(model, TrainedPeftModel):
            model.after_step(step)
        optimizer.zero_grad()
    return {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}, wanted


CASES_TRIED = [
    *((name, "dense") for name in FAMILIES if "target_parameters" not in FAMILIES[name]),
    *((name, "moe") for name in ON_EXPERTS),
]


@pytest.mark.parametrize(("name", "kind"), CASES_TRIED)
def test_a_family_trains_what_it_names_and_is_served_by_plain_libraries(
    bases, checkpoints, rows, asked, tmp_path, name, kind
):
    model, refused = prepared(bases[kind], name, rows)
    if model is None:
        assert re.fullmatch(
            rf".* is not in peft {peft.__version__}\. To use it, pip install 'peft>=[0-9.]+'\.", refused
        )
        return
    changed, wanted = stepped(model, rows)
    assert changed, "nothing was trained"
    assert changed <= wanted, f"frozen, and changed: {sorted(changed - wanted)[0]}"
    trained = logits(model, asked)
    assert not torch.allclose(trained, logits(bases[kind], asked), atol=1e-4), "vacuous: the answers are the base's"

    model.save_pretrained(tmp_path)
    register_adapters()
    adapter = METHODS[settings(name).train_type].adapter
    experts = experts_implementation(bases[kind].config, "float32")
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path if not adapter else checkpoints[kind], **experts)
    served = peft.PeftModel.from_pretrained(plain, str(tmp_path)) if adapter else plain
    torch.testing.assert_close(logits(served, asked), trained, rtol=1e-3, atol=1e-3)


def needs_data(name):
    return FAMILIES[name].get("init_weights") in ("lora-ga", "eva")


def test_no_train_type_is_left_out():
    assert {FAMILIES[name].get("train_type", "lora") for name in FAMILIES} == set(METHODS)
