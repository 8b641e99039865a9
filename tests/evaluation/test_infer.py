"""``qwenvl-ft infer`` answers as `generate` does, and reports errors on one line."""

import json

import numpy as np
import pytest
import torch
import typer
from peft import LoraConfig, VeraConfig, get_peft_model
from PIL import Image
from typer.testing import CliRunner

from qwenvl_ft.assemble import build_processor
from qwenvl_ft.cli.infer import infer, record
from qwenvl_ft.data.media.reading import Reading, saved_reading
from qwenvl_ft.errors import CheckpointError, DataError, QwenVLError
from qwenvl_ft.evaluation.generate import generate
from qwenvl_ft.model.load import load_model, load_processor
from qwenvl_ft.recipe.load import load_recipe

PROMPT = "What is shown in this picture?"


def ask(*arguments):
    app = typer.Typer()
    app.command()(infer)
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if isinstance(result.exception, QwenVLError):
        raise result.exception
    return result


@pytest.fixture
def images(tmp_path):
    paths = [tmp_path / f"{colour}.png" for colour in ("red", "blue")]
    for path in paths:
        Image.new("RGB", (64, 96), path.stem).save(path)
    return paths


@pytest.fixture
def adapter(tiny_dir, tmp_path):
    """An adapter that changes what the model says, saved with a processor that allows smaller images only."""
    model = load_model(tiny_dir, torch_dtype="float32")
    config = LoraConfig(r=4, lora_alpha=64, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    load_processor(tiny_dir, max_pixels=2048).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_the_answer_is_that_of_generate(tiny_dir, images):
    asked = {"image": [str(path) for path in images], "conversations": [{"from": "human", "value": "<image><image>x"}]}
    model, processor = load_model(tiny_dir, torch_dtype="float32"), load_processor(tiny_dir)
    (expected,) = generate(model, processor, [asked], max_new_tokens=8)
    result = ask(
        "--model", tiny_dir, "--image", images[0], "--image", images[1], "--prompt", "x", "--max-new-tokens", 8
    )
    assert (result.exit_code, result.stdout) == (0, expected + "\n")
    assert expected


def test_json_holds_the_answer_and_the_time(tiny_dir):
    plain = ask("--model", tiny_dir, "--prompt", PROMPT, "--max-new-tokens", 4).stdout
    printed = json.loads(ask("--model", tiny_dir, "--prompt", PROMPT, "--max-new-tokens", 4, "--json").stdout)
    assert printed["answer"] + "\n" == plain
    assert printed["seconds"] > 0


def test_an_adapter_is_used_with_its_own_processor(tiny_dir, adapter, images):
    arguments = ["--image", images[0], "--prompt", PROMPT, "--max-new-tokens", 12]
    base = ask("--model", tiny_dir, *arguments).stdout
    put_on = ask("--model", tiny_dir, "--adapter", adapter, *arguments).stdout
    assert put_on == ask("--model", adapter, *arguments).stdout
    assert put_on != base, "vacuous: the adapter changes nothing"
    model, processor = load_model(adapter, torch_dtype="float32"), load_processor(adapter)
    asked = record(PROMPT, [str(images[0])])
    assert generate(model, processor, [asked], max_new_tokens=12) == [put_on.removesuffix("\n")]
    assert processor.image_processor.size["longest_edge"] == 2048


@pytest.fixture
def others(tiny_dir, tmp_path):
    """More adapters: one with other targets and a full merger, one of another method."""
    for name, config in (
        ("other", LoraConfig(r=2, lora_alpha=64, target_modules=["up_proj"], modules_to_save=["visual.merger"])),
        ("foreign", VeraConfig(r=4, target_modules=["q_proj"])),
    ):
        model = get_peft_model(load_model(tiny_dir, torch_dtype="float32"), config)
        with torch.no_grad():
            for value in model.parameters():
                if value.requires_grad:
                    value += torch.randn(value.shape, generator=torch.Generator().manual_seed(1)) * 0.3
        model.save_pretrained(tmp_path / name)
    return tmp_path / "other", tmp_path / "foreign"


def test_several_adapters_answer_in_turn_as_each_does_alone(tiny_dir, adapter, others, images):
    arguments = ["--model", tiny_dir, "--image", images[0], "--prompt", PROMPT, "--max-new-tokens", 12]
    alone = [ask(*arguments, "--adapter", folder).stdout for folder in (adapter, others[0])]
    assert alone[0] != alone[1], "vacuous: both say the same"
    printed = ask(*arguments, "--adapter", adapter, "--adapter", others[0], "--adapter", adapter).stdout
    assert printed == f"{adapter}: {alone[0]}{others[0]}: {alone[1]}{adapter}: {alone[0]}"
    with pytest.raises(CheckpointError, match="foreign does not fit"):
        ask(*arguments, "--adapter", adapter, "--adapter", others[1])


def test_sampling_repeats_with_its_seed(tiny_dir):
    def draw(seed):
        arguments = ["--prompt", PROMPT, "--temperature", 5, "--max-new-tokens", 12, "--seed", seed]
        return ask("--model", tiny_dir, *arguments).stdout

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


@pytest.mark.parametrize(
    ("prompt", "images", "value"),
    [
        ("x", [], "x"),
        ("x", ["/a.png", "/b.png"], "<image>\n<image>\nx"),
        ("first <image> then <image>", ["/a.png", "/b.png"], "first <image> then <image>"),
    ],
)
def test_images_are_before_the_prompt_or_at_their_tags(prompt, images, value):
    asked = record(prompt, images)
    assert asked["conversations"] == [{"from": "human", "value": value}]
    assert asked["image"] == images


def test_urls_stay_urls_and_relative_paths_start_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert record("x", ["https://host/a.png", "b.png"])["image"] == ["https://host/a.png", str(tmp_path / "b.png")]


def test_errors_are_one_line(tiny_dir, tmp_path, images):
    for arguments, error, message in (
        (["--model", tmp_path / "none", "--prompt", "x"], CheckpointError, "no such model directory"),
        (["--model", tiny_dir, "--prompt", "x", "--adapter", tmp_path], CheckpointError, r"no adapter_config\.json"),
        (["--model", tiny_dir, "--prompt", "x", "--image", tmp_path / "no.png"], DataError, r"no\.png does not exist"),
        (["--model", tiny_dir, "--prompt", "<image> <image>", "--image", images[0]], DataError, "more <image> tags"),
    ):
        with pytest.raises(error, match=message) as raised:
            ask(*arguments)
        assert "\n" not in str(raised.value)
    assert ask("--model", tiny_dir, "--prompt", "x", "--temperature", -1).exit_code == 2


def test_an_adapter_of_another_shape_is_refused(tmp_path, adapter):
    from qwenvl_ft.model.tiny import make_tiny

    other = make_tiny(tmp_path / "other", hidden_size=32, head_dim=8)
    with pytest.raises(CheckpointError, match="does not fit"):
        ask("--model", other, "--adapter", adapter, "--prompt", "x")


def test_deep_images_are_read_as_in_training_unless_a_flag_says_otherwise(tiny_dir, tmp_path):
    deep = (np.arange(64 * 96) % 4096).astype(np.uint16).reshape(64, 96)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    recipe = load_recipe(overrides=[f"model.model={tiny_dir}", "data.high_bit_depth=window", "data.window=[-160,240]"])
    model = load_model(tiny_dir, torch_dtype="float32")
    model.save_pretrained(tmp_path / "trained")
    build_processor(recipe).save_pretrained(tmp_path / "trained")
    assert saved_reading(load_processor(tmp_path / "trained")) == Reading("window", (-160.0, 240.0))
    assert saved_reading(load_processor(tiny_dir)) == Reading("error")

    def answer(low, high):
        shown = np.floor(255 * (np.clip(deep.astype(float), low, high) - low) / (high - low) + 0.5).astype(np.uint8)
        asked = {"image": [Image.fromarray(shown)], "conversations": [{"from": "human", "value": "<image>x"}]}
        return generate(model, load_processor(tiny_dir), [asked], max_new_tokens=8)[0] + "\n"

    arguments = ["--image", tmp_path / "deep.png", "--prompt", "<image>x", "--max-new-tokens", 8]
    assert ask("--model", tmp_path / "trained", *arguments).stdout == answer(-160, 240)
    flags = ["--window", -50, 3000]
    assert ask("--model", tmp_path / "trained", *arguments, *flags).stdout == answer(-50, 3000)
    with pytest.raises(DataError, match="found 0 to 4095"):
        ask("--model", tiny_dir, *arguments)
    again = build_processor(load_recipe(overrides=[f"model.model={tmp_path / 'trained'}"]))
    assert saved_reading(again) == Reading("error"), "the recipe of the last training decides"
