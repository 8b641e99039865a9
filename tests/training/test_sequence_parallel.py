"""Ranks that share rows train the weights of one process, on every engine; by whole runs of the trainer."""

import json

import pytest
import torch
import torch.distributed as dist
from cases import ListRecords, quiet_arguments
from rank_cases import in_ranks
from safetensors.torch import load_file
from sequence_cases import images, in_float64, text, video

from qwenvl_ft.data.plan.dataset import SampleDataset
from qwenvl_ft.errors import RecipeError
from qwenvl_ft.model.load import load_model
from qwenvl_ft.training.deepspeed import deepspeed_config
from qwenvl_ft.training.ranks import join_ranks
from qwenvl_ft.training.trainer import QwenVLTrainer
from qwenvl_ft.upstream.probe import fallbacks

RECORDS = [
    text(3),
    images(64, 128),
    video(6),
    text(9),
    images(96),
    images(160),
    text(12),
    text(1),
    video(4),
    images(64, 64, 96),
    text(5),
    text(2),
]
ROW, STEPS, ROWS_PER_STEP = 200, 4, 2
ENGINES = {
    "ddp": {},
    "fsdp2": {"fsdp": "full_shard", "fsdp_config": {"version": 2}},
    "zero2": {"deepspeed": "zero2"},
    "zero3": {"deepspeed": "zero3"},
}
WRAPPERS = {"ddp": "DistributedDataParallel", "fsdp2": "FSDP", "zero2": "DeepSpeed", "zero3": "DeepSpeed"}
"""Engine -> part of the name of the class that it makes of the model."""
EXACT = 1e-6
"""Largest difference relative to the loss, and to how far a weight has moved; of float64."""
ROUNDED = 2e-4
"""The same for DeepSpeed, which trains in float32, against one process in float64; and `EXACT` of each weight."""


def trained(folder, checkpoint, encoder, size, engine="ddp", changes=(), **options):
    """Train four steps in each rank; return losses, the loss of an evaluation, and the folder of the weights.

    Args:
        changes: functions that prepare the model.
    """
    fallbacks()  # as `prepare_run` does: under ZeRO-3 the answers could not be found any more
    arguments = {key: value for key, value in ENGINES[engine].items() if dist.get_world_size() > 1}
    if "deepspeed" in arguments:
        arguments["deepspeed"] = deepspeed_config(arguments["deepspeed"])
    settings = {"optim": "sgd", "learning_rate": 0.05, "lr_scheduler_type": "constant", "weight_decay": 0.0}
    settings |= {"max_steps": STEPS, "max_grad_norm": 0.5, "logging_steps": 1, "save_strategy": "no"}
    settings |= {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 2, "ddp_backend": "gloo"}
    settings["gradient_accumulation_steps"] = ROWS_PER_STEP * size // dist.get_world_size()
    model_options = {name: options.pop(name) for name in ("z_loss", "loss_weights") if name in options}
    args = quiet_arguments(folder, **(settings | arguments | options))
    join_ranks(args)
    model = load_model(str(checkpoint), torch_dtype="float32", attn_impl="packed_sdpa")
    for change in changes:
        model = change(model)
    model = model if "deepspeed" in arguments else in_float64(model)
    dataset = SampleDataset(ListRecords(RECORDS, datasets=["odd", "even"] * 6), encoder, cache_dir=folder / "cache")
    trainer = QwenVLTrainer(
        model,
        args,
        processor=encoder.processor,
        train_dataset=dataset,
        eval_dataset=dataset,
        max_length=ROW,
        sequence_parallel_size=size,
        **model_options,
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    wrapper = type(trainer.model_wrapped).__name__
    assert WRAPPERS[engine] in wrapper or dist.get_world_size() == 1, f"vacuous: {engine} was not used, but {wrapper}"
    evaluated = trainer.evaluate()["eval_loss"]
    trainer.save_model(str(folder / "model"))
    dist.barrier()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    supervised = trainer.state.log_history[0]["supervised_tokens"]
    return {"losses": losses, "evaluated": evaluated, "tokens": supervised, "draw": float(torch.rand(()))}


def weights(folder):
    """Return the saved weights by their names in the language model and the tower, in float64."""
    found = {}
    for file in folder.glob("*.safetensors"):
        found |= {name.split("base_model.")[-1]: value.double() for name, value in load_file(file).items()}
    return found


class Runs:
    """Runs of the trainer, each in a folder of its own, beside one process without sharing."""

    def __init__(self, root, checkpoint, encoder):
        self.root, self.checkpoint, self.encoder = root, checkpoint, encoder
        self.kept, self.started = {}, 0

    def run(self, ranks, size, engine="ddp", **options):
        key = json.dumps([ranks, size, engine, {name: str(value) for name, value in options.items()}])
        if key not in self.kept:
            folder, self.started = self.root / str(self.started), self.started + 1
            folder.mkdir()
            arguments = (folder, self.checkpoint, self.encoder, size, engine, options)
            results = in_ranks(ranks, _trained, *arguments)
            assert all(result["losses"] == results[0]["losses"] for result in results)
            assert len({result["draw"] for result in results}) == size, "ranks of a row draw the same dropout and noise"
            self.kept[key] = results[0] | {"weights": weights(folder / "model"), "folder": folder}
        return self.kept[key]

    def assert_same(self, ranks, size, engine="ddp", tolerance=EXACT, **options):
        alone, shared = self.run(1, 1, **options), self.run(ranks, size, engine, **options)
        begin = weights(self.checkpoint)
        assert shared["losses"] == pytest.approx(alone["losses"], rel=tolerance)
        assert shared["evaluated"] == pytest.approx(alone["evaluated"], rel=tolerance)
        assert shared["tokens"] == alone["tokens"]
        assert shared["weights"].keys() >= alone["weights"].keys() - {"lm_head.weight"}
        moved = 0.0
        for name, expected in alone["weights"].items():
            if name in shared["weights"]:
                way = float((expected - begin[name]).abs().max()) if name in begin else float(expected.abs().max())
                moved = max(moved, way)
                slack = 1e-9 if tolerance == EXACT else EXACT * float(expected.abs().max())
                assert float((shared["weights"][name] - expected).abs().max()) <= tolerance * way + slack, name
        assert moved > 1e-3, "vacuous: nothing moved"


def _trained(folder, checkpoint, encoder, size, engine, options):
    return trained(folder, checkpoint, encoder, size, engine, **options)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, checkpoints, encoder):
    return {kind: Runs(tmp_path_factory.mktemp(kind), folder, encoder) for kind, folder in checkpoints.items()}


@pytest.mark.distributed
def test_two_ranks_of_a_row_train_the_weights_of_one(runs):
    runs["dense"].assert_same(2, 2)


@pytest.mark.soak
@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["dense", "moe"])
@pytest.mark.parametrize(("ranks", "size"), [(2, 2), (4, 2), (4, 4)])
@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_trains_the_weights_of_one_process(runs, kind, ranks, size, engine):
    tolerance = ROUNDED if engine.startswith("zero") else EXACT
    runs[kind].assert_same(ranks, size, engine, tolerance)


OPTIONS = {
    "checkpointing": {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}},
    "smoothing and z-loss": {"label_smoothing_factor": 0.1, "z_loss": 1e-3},
    "weights": {"loss_weights": {"odd": 3.0, "even": 0.25}},
    "compiled layers": {"torch_compile": True, "torch_compile_backend": "aot_eager"},
}


@pytest.mark.soak
@pytest.mark.distributed
@pytest.mark.parametrize("name", OPTIONS)
def test_options_train_the_weights_of_one_process(runs, name):
    runs["dense"].assert_same(2, 2, **OPTIONS[name])


def test_reentrant_checkpointing_of_a_script_is_refused_in_one_line(tmp_path, tiny_dir, encoder):
    """Features of images reach the layers as keyword arguments, which would have no gradient."""
    options = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"early_stop": False}}
    model = load_model(str(tiny_dir), torch_dtype="float32", attn_impl="packed_sdpa")
    with pytest.raises(RecipeError, match=r"=2 does not work with reentrant .* Set .*use_reentrant=false\.$"):
        QwenVLTrainer(
            model, quiet_arguments(tmp_path, **options), processor=encoder.processor, sequence_parallel_size=2
        )


@pytest.mark.soak
@pytest.mark.distributed
@pytest.mark.parametrize(("first", "then"), [((2, 2), (2, 2)), ((2, 2), (1, 1)), ((1, 1), (4, 2))])
def test_a_run_resumes_with_another_number_of_ranks_to_a_row(runs, tmp_path, first, then):
    whole = runs["dense"].run(1, 1)
    case = runs["dense"]
    in_ranks(first[0], _trained, tmp_path, case.checkpoint, case.encoder, first[1], "ddp", HALF)
    options = {"resume_from_checkpoint": str(tmp_path / "checkpoint-2")}
    found = in_ranks(then[0], _trained, tmp_path, case.checkpoint, case.encoder, then[1], "ddp", options)[0]
    assert found["losses"] == pytest.approx(whole["losses"], rel=EXACT)
    for name, value in weights(tmp_path / "model").items():
        assert torch.allclose(value, whole["weights"][name], rtol=0, atol=1e-7), name


HALF = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
