"""A run resumes with the settings it began with, or fails with one line; models of other runs are not its own."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from run_cases import saves, short_run, write_questions
from safetensors.torch import load_file

from qwenvl_ft.errors import CheckpointError, RecipeError
from qwenvl_ft.export.merge import merge
from qwenvl_ft.model.load import load_model
from qwenvl_ft.recipe.load import load_recipe
from qwenvl_ft.train import main
from qwenvl_ft.train import train as train_function
from qwenvl_ft.training.announce import _other_draws


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Twelve records with images, and the first six of them."""
    folder = tmp_path_factory.mktemp("same_run")
    lines = write_questions(folder, 12, answer="number", widths=(64, 80, 96, 112)).read_text().splitlines()
    (folder / "half.jsonl").write_text("\n".join(lines[:6]) + "\n")
    turned = [json.dumps(json.loads(line) | {"image": "3.png"}) for line in lines]
    (folder / "other.jsonl").write_text("\n".join(turned) + "\n")
    return folder


def settings(tiny_dir, data, output, *more):
    return short_run(
        tiny_dir,
        data / "train.jsonl",
        output,
        "template.max_length=256",
        "tuner.train_type=lora",
        "tuner.freeze_vit=false",
        "tuner.lora_dropout=0",
        "training.optim=sgd",
        "training.packing=false",
        "training.per_device_train_batch_size=1",
        "training.gradient_accumulation_steps=2",
        "training.max_steps=4",
        "training.learning_rate=1e-2",
        *saves(more, keep=5),
        *more,
    )


@pytest.fixture(scope="module")
def begun(tiny_dir, data, tmp_path_factory):
    """A finished run of four steps, and its folder as it was after two."""
    output = tmp_path_factory.mktemp("begun") / "run"
    train_function(load_recipe(None, settings(tiny_dir, data, output)))
    half = output.parent / "half"
    half.mkdir()
    shutil.copytree(output / "checkpoint-2", half / "checkpoint-2")
    return output, half


@pytest.fixture
def halfway(begun, tmp_path):
    """A run that was stopped after two steps."""
    shutil.copytree(begun[1], tmp_path / "run")
    return tmp_path / "run"


CHANGES = {
    "rank": (["tuner.lora_rank=4"], "tuner.lora_rank is 4 and was 8"),
    "scale": (["tuner.lora_alpha=64"], "tuner.lora_alpha is 64 and was 32"),
    "method": (["tuner.train_type=longlora"], "tuner.train_type is 'longlora' and was 'lora'"),
    "rate": (["training.learning_rate=1e-5"], "training.learning_rate is 1e-05 and was 0.01"),
    "seed": (["training.seed=7"], "training.seed is 7 and was 42"),
    "packing": (["training.packing=true"], "training.packing is true and was false"),
    "length": (["template.max_length=128"], "template.max_length is 128 and was 256"),
    "several": (
        ["tuner.lora_rank=4", "tuner.lora_alpha=8", "tuner.lora_dropout=0.5", "training.seed=7"],
        "and 1 more",
    ),
    "accumulation": (["training.gradient_accumulation_steps=1"], "a step takes 1 rows and took 2"),
    "rows": (["training.per_device_train_batch_size=2"], "a step takes 4 rows and took 2"),
    "fewer records": (["data.train=DATA/half.jsonl"], "data.train has 6 samples and had 12. Give the data"),
    "other records": (
        ["data.train=DATA/other.jsonl"],
        "has 12 samples and had 12, with different lengths. Give the data",
    ),
}


@pytest.mark.parametrize("case", CHANGES)
def test_what_would_be_another_run_is_one_line(tiny_dir, data, halfway, capsys, case):
    more, message = CHANGES[case]
    more = [word.replace("DATA", str(data)) for word in more]
    words = settings(tiny_dir, data, halfway, *more, "training.resume_from_checkpoint=true")
    assert main(words) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: training.resume_from_checkpoint={halfway / 'checkpoint-2'}: ")
    assert message in error
    assert not (halfway / "checkpoint-4").exists()


@pytest.mark.parametrize("more", [[], ["gradient_accumulation_steps=1", "per_device_train_batch_size=2"]])
def test_the_same_run_goes_on_to_the_same_weights_also_with_other_passes(tiny_dir, data, begun, halfway, more):
    free = ["logging_steps=1", "save_total_limit=3", *more]
    words = settings(tiny_dir, data, halfway, "training.resume_from_checkpoint=true", *(f"training.{w}" for w in free))
    train_function(load_recipe(None, words))
    expected, found = (load_file(folder / "adapter_model.safetensors") for folder in (begun[0], halfway))
    before = load_file(halfway / "checkpoint-2" / "adapter_model.safetensors")
    for name, weight in expected.items():
        assert torch.allclose(found[name], weight, atol=1e-5), name
    assert any(float((before[name] - expected[name]).abs().max()) > 1e-3 for name in before), "vacuous: nothing moved"


def test_a_fresh_run_does_not_go_beside_a_model_of_another(tiny_dir, data, tmp_path, capsys):
    output = tmp_path / "run"
    quick = ("training.max_steps=1", "training.save_strategy=no")
    assert main(settings(tiny_dir, data, output, *quick)) == 0
    before = {path: path.stat().st_mtime_ns for path in output.iterdir()}
    for resume in ("false", "true"):
        words = settings(tiny_dir, data, output, *quick, "tuner.lora_rank=4")
        assert main([*words, f"training.resume_from_checkpoint={resume}"]) == 2
        assert f"output_dir={output} holds adapter_model.safetensors already" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in output.iterdir()} == before


def test_a_folder_of_a_model_and_an_adapter_is_neither(tiny_dir, begun, tmp_path):
    shutil.copytree(tiny_dir, tmp_path / "both")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(begun[0] / name, tmp_path / "both")
    with pytest.raises(CheckpointError, match=r"holds a whole model and an adapter"):
        load_model(tmp_path / "both")


def test_an_adapter_is_opened_with_the_rope_scaling_it_was_trained_with(tiny_dir, data, tmp_path):
    scaling = "model.rope_scaling={type: yarn, factor: 2.0}"
    words = settings(tiny_dir, data, tmp_path / "run", scaling, "training.max_steps=1", "training.save_strategy=no")
    train_function(load_recipe(None, words))
    opened = load_model(tmp_path / "run", torch_dtype="float32")
    assert opened.get_base_model().config.text_config.rope_parameters["rope_type"] == "yarn"
    merge(tmp_path / "run", tmp_path / "merged")
    merged = load_model(tmp_path / "merged", torch_dtype="float32")
    again = settings(tiny_dir, data, tmp_path / "next", f"tuner.resume_from_checkpoint={tmp_path / 'run'}")
    with pytest.raises(RecipeError, match=r"was trained with model.rope_scaling=.*yarn.*Set it"):
        train_function(load_recipe(None, again))
    (tmp_path / "run" / "recipe.yaml").unlink()
    plain = load_model(tmp_path / "run", torch_dtype="float32")
    assert plain.get_base_model().config.text_config.rope_parameters["rope_type"] == "default", "vacuous"
    ids = torch.arange(20)[None] + 5
    with torch.no_grad():
        logits = [model.eval()(input_ids=ids).logits for model in (opened, plain, merged)]
    assert float((logits[0] - logits[1]).abs().max()) > 1e-4
    torch.testing.assert_close(logits[2], logits[0], rtol=1e-4, atol=1e-5)


def test_weights_alone_start_a_new_run_also_without_optimizer_or_manifest(tiny_dir, data, halfway, tmp_path, capsys):
    """With a rate of 0 the new run ends with the weights that it started from, at its own step 1."""
    alone = tmp_path / "alone"
    alone.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(halfway / "checkpoint-2" / name, alone)
    quick = ["max_steps=1", "learning_rate=0", "save_strategy=no", "resume_weights_only=true"]
    words = settings(tiny_dir, data, tmp_path / "new", *(f"training.{word}" for word in quick))
    assert main(words) == 2
    assert "needs the folder of a checkpoint" in capsys.readouterr().err
    assert main([*words, f"training.resume_from_checkpoint={alone}"]) == 0
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (alone, tmp_path / "new"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert any(float(value.abs().max()) > 0 for name, value in before.items() if "lora_B" in name), "vacuous: untrained"
    assert json.loads((tmp_path / "new" / "trainer_state.json").read_text())["global_step"] == 1
    assert "resume_weights_only: false" in (tmp_path / "new" / "recipe.yaml").read_text(), "resuming it starts it anew"
    weights = halfway / "checkpoint-2" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    for key in ("training.resume_from_checkpoint", "tuner.resume_from_checkpoint"):
        more = "true" if key.startswith("training") else "false"
        words = settings(tiny_dir, data, tmp_path / "more", f"{key}={halfway / 'checkpoint-2'}")
        assert main([*words, f"training.resume_weights_only={more}"]) == 2
        assert f"error: {key}={halfway / 'checkpoint-2'}: adapter_model.safetensors does not" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("processes", "sharing", "share", "line"),
    [
        (4, 2, 0.1, ""),
        (2, 1, 0.0, ""),
        (2, 1, 0.1, "saved by 4 processes, 2 to a row and resumed by 2 processes: dropout will draw other numbers"),
        (4, 4, 0.1, "resumed by 4 processes, 4 to a row: dropout will draw other numbers"),
    ],
)
def test_a_resumed_run_says_that_masks_are_drawn_otherwise(tmp_path, processes, sharing, share, line):
    (tmp_path / "recipe.yaml").write_text("training: {sequence_parallel_size: 2}\n")
    for rank in range(4):
        (tmp_path / f"rng_state_{rank}.pth").touch()
    trainer = SimpleNamespace(args=SimpleNamespace(world_size=processes), sequence_parallel_size=sharing, noise=None)
    trainer.model = torch.nn.Dropout(share)
    found = _other_draws(trainer, tmp_path)
    assert line in found
    assert bool(found) == bool(line)
