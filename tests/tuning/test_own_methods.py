"""Every method of ours changes nothing untrained, trains only its own weights, packs, saves and resumes."""

import json

import pytest
import torch
from cases import MOST_KINDS, RECORDS, ListRecords, quiet_arguments, stirred

from qwenvl_ft.data.collate import QwenVLCollator
from qwenvl_ft.data.plan.dataset import SampleDataset
from qwenvl_ft.model.anatomy import canonical_name
from qwenvl_ft.model.load import load_model
from qwenvl_ft.training.loss import loss_sum, split_labels
from qwenvl_ft.training.trainer import QwenVLTrainer
from qwenvl_ft.tuning.prepare import prepare_model

TEXT_ONLY = {"freeze_vit": True, "freeze_aligner": True}
REFT = {"train_type": "reft", "reft_positions": "f2+l3", **TEXT_ONLY}
METHODS = {
    "adapter": {"train_type": "adapter", "adapter_length": 8},
    "adapter on the aligner": {
        "train_type": "adapter",
        "adapter_length": 8,
        "freeze_llm": True,
        "target_regex": r"^model\.visual\.(merger|deepstack_merger_list\.[0-2]).*",
    },
    "adapter beside a full merger": {
        "train_type": "adapter",
        "freeze_vit": True,
        "modules_to_save": ["model.visual.merger"],
    },
    "loreft": REFT,
    "noreft": REFT | {"reft_intervention_type": "NoreftIntervention", "reft_layers": [0, 3]},
    "consreft": REFT | {"reft_intervention_type": "ConsreftIntervention"},
    "reft everywhere": REFT | {"reft_positions": "all"},
    "llamapro": {"train_type": "llamapro", "llamapro_num_new_blocks": 2, **TEXT_ONLY},
    "longlora": {"train_type": "longlora", "longlora_group_size": 16, **TEXT_ONLY},
}
CHANGES_AT_ONCE = ("consreft",)
"""Its formula replaces a subspace by a constant, so no initialisation keeps the output."""

every_method = pytest.mark.parametrize("name", METHODS)
BLOCKS = {"dense": [3, 5], "moe": [3, 5], "qwen3_5": [2, 5], "qwen3_5_moe": [2, 5]}
"""Kind -> the new blocks of LLaMA Pro: Qwen3-VL has none among the layers that take deepstack features."""
both_kinds = pytest.mark.parametrize("kind", MOST_KINDS)


@pytest.fixture
def prepared(fresh, tuner):
    """Return a prepared model; ``stir`` changes its trainable weights, each time in the same way."""

    def make(name, kind, *, stir=False):
        torch.manual_seed(0)
        model = prepare_model(fresh(kind), tuner(**METHODS[name]))
        if stir:
            stirred(model, 0.05)
        return model

    return make


@both_kinds
@every_method
def test_an_untrained_method_changes_no_logit(prepared, fresh, logits, name, kind):
    found, base = logits(prepared(name, kind)), logits(fresh(kind))
    if name in CHANGES_AT_ONCE:
        assert not torch.allclose(found, base, atol=1e-3)
    else:
        assert torch.equal(found, base)


@both_kinds
@every_method
def test_training_moves_the_methods_own_weights_and_no_other(prepared, train, name, kind):
    model = prepared(name, kind)
    before = {key: value.detach().clone() for key, value in model.named_parameters()}
    train(model)
    trained = {key for key, value in model.named_parameters() if value.requires_grad}
    moved = {key for key, value in model.named_parameters() if not torch.equal(value, before[key])}
    assert moved == trained
    assert 0 < len(trained) < len(before)


@both_kinds
@every_method
def test_no_weight_of_the_base_model_is_among_the_trained(prepared, fresh, name, kind):
    base = {key for key, _ in fresh(kind).named_parameters()}
    model = prepared(name, kind)
    trained = {key for key, value in model.named_parameters() if value.requires_grad}
    if name == "llamapro":
        assert {int(key.split(".layers.")[1].split(".")[0]) for key in trained} == set(BLOCKS[kind])
        return
    own = {key for key in trained if ".modules_to_save." not in key}
    assert own
    assert not {canonical_name(key) for key in own} & base


@both_kinds
@every_method
def test_a_saved_method_loads_to_the_same_logits(prepared, fresh, train, logits, tmp_path, name, kind):
    model = train(prepared(name, kind))
    trained = logits(model)
    assert not torch.allclose(trained, logits(fresh(kind)), atol=1e-2), "vacuous: nothing was learnt"
    model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.bin"))
    again = load_model(tmp_path, torch_dtype="float32", attn_impl="sdpa")
    assert torch.equal(logits(again), trained)
    if name == "llamapro":
        assert json.loads((tmp_path / "config.json").read_text())["llamapro_new_blocks"] == BLOCKS[kind]
    else:
        written = json.loads((tmp_path / "adapter_config.json").read_text())
        kinds = {"adapter": "BOTTLENECK", "reft": "REFT", "longlora": "LORA"}
        assert written["peft_type"] == kinds[METHODS[name]["train_type"]]


def run(model, batches):
    """Return the logits of all batches, and gradients of the summed loss, in training mode."""
    model.train()
    plain = [{key: value for key, value in batch.items() if key not in ("labels", "sources")} for batch in batches]
    with torch.no_grad():
        logits = torch.cat([model(**batch).logits for batch in plain], dim=1)
    model.zero_grad(set_to_none=True)
    sum(loss_sum(model, split_labels(batch)) for batch in batches).backward()
    return logits, {key: value.grad.clone() for key, value in model.named_parameters() if value.grad is not None}


@pytest.fixture(scope="module")
def samples(encoder, mixed_records):
    return [encoder(mixed_records[i]) for i in (3, 1, 0, 4, 2)]


@both_kinds
@every_method
def test_packed_equals_alone(prepared, samples, name, kind):
    model, collate = prepared(name, kind, stir=True), QwenVLCollator()
    alone, grads_alone = run(model, [collate([sample]) for sample in samples])
    packed, grads_packed = run(model, [collate(samples)])
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=2e-5)
    assert grads_packed.keys() == grads_alone.keys()
    for key, grad in grads_alone.items():
        torch.testing.assert_close(grads_packed[key], grad, rtol=1e-3, atol=2e-5 * float(grad.abs().max()))
    one_row = {key: value for key, value in collate(samples).items() if not key.startswith(("cu_seq", "max_length"))}
    one_row["position_ids"] = one_row["position_ids"][1:]
    assert not torch.allclose(run(model, [one_row])[0], alone, atol=1e-2), "vacuous: borders change nothing"


@both_kinds
@every_method
def test_checkpointed_activations_give_the_same_gradients(prepared, samples, name, kind):
    grads = []
    for checkpointing in (False, True):
        model = prepared(name, kind, stir=True)
        if checkpointing:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        grads.append(run(model, [QwenVLCollator()(samples)])[1])
    assert grads[0].keys() == grads[1].keys()
    assert grads[0].keys() == {key for key, value in model.named_parameters() if value.requires_grad}
    for key, grad in grads[0].items():
        torch.testing.assert_close(grads[1][key], grad)


def trained_weights(model, folder, encoder, *, steps, resume=None):
    """Train to one of four steps, saving every second one, and return the trained weights."""
    args = quiet_arguments(
        folder,
        max_steps=4,
        save_steps=2,
        learning_rate=1e-2,
        weight_decay=0.1,
        activation_checkpointing=True,
        activation_checkpointing_kwargs={"use_reentrant": False},
        logging_steps=1,
    )
    dataset = SampleDataset(ListRecords(RECORDS, "own"), encoder, cache_dir=folder / "cache")
    trainer = QwenVLTrainer(model, args, processor=encoder.processor, train_dataset=dataset, max_length=256)
    trainer.train(resume_from_checkpoint=resume)
    assert trainer.state.global_step == steps
    return {key: value.detach().clone() for key, value in model.named_parameters() if value.requires_grad}


@both_kinds
@pytest.mark.parametrize("name", ["adapter beside a full merger", "loreft", "llamapro", "longlora"])
def test_a_resumed_run_ends_at_the_same_bits(prepared, encoder, tmp_path, name, kind):
    whole = trained_weights(prepared(name, kind), tmp_path / "whole", encoder, steps=4)
    other = prepared(name, kind, stir=True)  # what the checkpoint holds must take the place of all of it
    resumed = trained_weights(
        other, tmp_path / "resumed", encoder, steps=4, resume=str(tmp_path / "whole" / "checkpoint-2")
    )
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    start = {key: value for key, value in prepared(name, kind).named_parameters() if value.requires_grad}
    assert any(not torch.equal(start[key], whole[key]) for key in whole), "vacuous: training moves nothing"


@every_method
def test_generation_runs_with_and_without_a_cache(prepared, batch, name):
    """Decoding steps see one token at a time, which is answer, and do not change the edits of the prompt."""
    model = prepared(name, "dense", stir=True).eval()
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    cached = model.generate(**batch, **options, use_cache=True)
    assert torch.equal(cached[:, : batch["input_ids"].shape[1]], batch["input_ids"])
    if METHODS[name]["train_type"] != "reft":  # without a cache the answer so far is part of the prompt
        assert torch.equal(model.generate(**batch, **options, use_cache=False), cached)


def test_every_own_method_is_tried():
    from qwenvl_ft.tuning.methods import METHODS as KNOWN

    assert {settings["train_type"] for settings in METHODS.values()} == {"adapter", "reft", "llamapro", "longlora"}
    assert {settings["train_type"] for settings in METHODS.values()} <= set(KNOWN)
