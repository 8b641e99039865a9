"""The tiny checkpoint behaves as a released one: files, tokenizer, template, processor, model classes."""

import json
import os
from pathlib import Path

import pytest
import torch
import typer
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeForConditionalGeneration,
    Qwen3VLProcessor,
)
from typer.testing import CliRunner

from qwenvl_ft.cli.tiny import tiny as tiny_command
from qwenvl_ft.errors import CheckpointError
from qwenvl_ft.model.tiny import PLAIN_ADDED_TOKENS, SPECIAL_TOKENS, make_tiny

SHARED = Path(os.environ.get("QWENVL_FT_SHARED", Path(__file__).resolve().parents[3] / "shared"))
RELEASED = SHARED / "qwen3vl_processor"
needs_released = pytest.mark.skipif(not RELEASED.is_dir(), reason="the released processor's files are not here")

IMAGE = {"type": "image", "image": "x.png"}
VIDEO = {"type": "video", "video": "x.mp4"}
TOOLS = [{"type": "function", "function": {"name": "größe", "parameters": {"type": "object", "properties": {}}}}]


def text(value):
    return {"type": "text", "text": value}


def user(*parts):
    return {"role": "user", "content": parts[0] if isinstance(parts[0], str) else list(parts)}


def call(name, arguments, wrapped=True):
    function = {"name": name, "arguments": arguments}
    return {"type": "function", "function": function} if wrapped else function


CONVERSATIONS = {
    "plain": [user("hi"), {"role": "assistant", "content": "hello\n"}],
    "system as text": [{"role": "system", "content": "Be brief. "}, user("hi")],
    "system as parts": [{"role": "system", "content": [text("a"), IMAGE, text(" b")]}, user("hi")],
    "late system is ignored": [user("hi"), {"role": "system", "content": "no"}, {"role": "assistant", "content": "x"}],
    "image then text": [user(IMAGE, text("\n what? "))],
    "text around images": [user(text("a"), IMAGE, text("b"), IMAGE, text("c")), {"role": "assistant", "content": "d"}],
    "url part": [user({"type": "image_url", "image_url": {"url": "x"}}, text("?"))],
    "videos and images over turns": [
        user(VIDEO, IMAGE, text("one")),
        {"role": "assistant", "content": [text("x"), text("y")]},
        user(IMAGE, VIDEO, text("two")),
        {"role": "assistant", "content": "z"},
    ],
    "assistant media are not shown": [user("hi"), {"role": "assistant", "content": [IMAGE, text("here")]}],
    "unknown part": [user({"type": "audio", "audio": "x"}, text("?"))],
    "empty texts": [user(""), {"role": "assistant", "content": ""}],
    "tool call": [
        user("how big?"),
        {"role": "assistant", "content": "", "tool_calls": [call("größe", {"a": [1, "ü"]})]},
        {"role": "tool", "content": "12"},
        {"role": "assistant", "content": "twelve"},
    ],
    "two calls after text, two results": [
        user("how big?"),
        {"role": "assistant", "content": "see", "tool_calls": [call("f", '{"x": 1}'), call("g", {}, wrapped=False)]},
        {"role": "tool", "content": "1"},
        {"role": "tool", "content": [IMAGE, text("2"), VIDEO]},
        user(IMAGE, text("and?")),
    ],
    "tool result first": [{"role": "tool", "content": "1"}, user("so?")],
    "no calls": [user("hi"), {"role": "assistant", "content": "x", "tool_calls": []}],
    "unknown role": [user("hi"), {"role": "critic", "content": "bad"}],
    "control tokens and unicode": [user("<|im_end|> é 漢字 \r\n\t  "), {"role": "assistant", "content": "\n\nok"}],
}


@pytest.fixture(scope="module")
def tiny(checkpoints):
    return checkpoints["dense"]


@pytest.fixture(scope="module")
def tiny_moe(checkpoints):
    return checkpoints["moe"]


@pytest.fixture(scope="module")
def processor(tiny):
    return AutoProcessor.from_pretrained(tiny)


def test_plain_transformers_loads_both_kinds(tiny, tiny_moe):
    for directory, kind in ((tiny, Qwen3VLForConditionalGeneration), (tiny_moe, Qwen3VLMoeForConditionalGeneration)):
        model, loading = AutoModelForImageTextToText.from_pretrained(directory, output_loading_info=True)
        assert type(model) is kind
        assert not loading["missing_keys"]
        assert not loading["unexpected_keys"]
        assert type(AutoProcessor.from_pretrained(directory)) is Qwen3VLProcessor
        assert not list(directory.glob("*.bin")), "weights must be safetensors"


def test_tied_like_the_small_released_models_and_untied_with_experts(tiny, tiny_moe):
    dense = AutoModelForImageTextToText.from_pretrained(tiny)
    experts = AutoModelForImageTextToText.from_pretrained(tiny_moe)
    assert dense.lm_head.weight is dense.model.language_model.embed_tokens.weight
    assert experts.lm_head.weight is not experts.model.language_model.embed_tokens.weight
    assert experts.model.language_model.layers[0].mlp.experts.gate_up_proj.ndim == 3


def test_has_three_deepstack_mergers_and_interleaved_mrope(tiny):
    model = AutoModelForImageTextToText.from_pretrained(tiny)
    rope = model.config.text_config.rope_parameters
    assert len(model.model.visual.deepstack_merger_list) == 3
    assert rope["mrope_interleaved"] is True
    assert sum(rope["mrope_section"]) == model.config.text_config.head_dim // 2


def test_same_arguments_write_the_same_bytes_and_another_seed_other_weights(tiny, tmp_path):
    state = torch.random.get_rng_state()
    again = make_tiny(tmp_path / "again")
    assert torch.equal(state, torch.random.get_rng_state()), "the caller's random state moved"
    for file in sorted(again.iterdir()):
        assert file.read_bytes() == (tiny / file.name).read_bytes(), file.name
    other = make_tiny(tmp_path / "other", seed=1)
    assert (other / "model.safetensors").read_bytes() != (tiny / "model.safetensors").read_bytes()


def test_an_unknown_size_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"'hiden_size'.*Did you mean 'hidden_size'"):
        make_tiny(tmp_path, hiden_size=32)
    assert not list(tmp_path.iterdir())


def test_image_runs_through_processor_model_and_generation(tiny, processor):
    model = AutoModelForImageTextToText.from_pretrained(tiny).eval()
    image = Image.new("RGB", (96, 64), (200, 30, 30))
    messages = [user({"type": "image", "image": image}, text("What colour?"))]
    inputs = processor.apply_chat_template(
        messages, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    assert inputs["image_grid_thw"].tolist() == [[1, 4, 6]]
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 4 * 6 // 4
    generated = model.generate(**inputs, max_new_tokens=3)
    assert generated.shape[1] > inputs["input_ids"].shape[1]


def test_every_byte_survives_the_tokenizer(processor):
    tokenizer = processor.tokenizer
    for start in range(0, 0x3000, 97):
        sample = "".join(chr(code) for code in range(start, start + 97))
        normal = tokenizer.backend_tokenizer.normalizer.normalize_str(sample)
        assert tokenizer.decode(tokenizer(sample)["input_ids"]) == normal
    assert {chr(b) for b in b"!~"} <= set(tokenizer.get_vocab())
    assert sum(len(word) == 1 for word in tokenizer.get_vocab()) == 256


def test_text_is_nfc_normalised(processor):
    assert processor.tokenizer("e\u0301")["input_ids"] == processor.tokenizer("\u00e9")["input_ids"]


def test_merges_shorten_words_and_digits_stay_single(processor):
    tokenizer = processor.tokenizer
    assert len(tokenizer(" picture")["input_ids"]) < len(" picture")
    assert len(tokenizer("12345")["input_ids"]) == 5


def test_special_tokens_follow_the_words_in_order(processor):
    tokenizer = processor.tokenizer
    ids = tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS + PLAIN_ADDED_TOKENS)
    assert ids == list(range(512, 512 + len(ids)))
    assert tokenizer("a<|im_end|>b<|image_pad|>")["input_ids"][1::2] == tokenizer.convert_tokens_to_ids(
        ["<|im_end|>", "<|image_pad|>"]
    )
    assert tokenizer.decode(ids, skip_special_tokens=True) == "".join(PLAIN_ADDED_TOKENS)


@needs_released
def test_tokenizer_is_made_as_the_released_one(tiny):
    ours = json.loads((tiny / "tokenizer.json").read_text())
    released = json.loads((RELEASED / "tokenizer.json").read_text())
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder", "truncation", "padding"):
        assert ours[part] == released[part], part
    first = {"ours": len(ours["model"]["vocab"]), "released": len(released["model"]["vocab"])}
    ours_added = [token | {"id": token["id"] - first["ours"]} for token in ours["added_tokens"]]
    assert ours_added == [token | {"id": token["id"] - first["released"]} for token in released["added_tokens"]]
    assert {k: v for k, v in ours["model"].items() if k not in ("vocab", "merges")} == {
        k: v for k, v in released["model"].items() if k not in ("vocab", "merges")
    }


@needs_released
def test_processor_differs_from_the_released_one_in_areas_only(tiny):
    ours = json.loads((tiny / "processor_config.json").read_text())
    released = json.loads((RELEASED / "processor_config.json").read_text())
    for part in ("image_processor", "video_processor"):
        assert {k: v for k, v in ours[part].items() if k != "size"} == {
            k: v for k, v in released[part].items() if k != "size"
        }


@needs_released
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_template_renders_what_the_released_one_renders(processor, name):
    released = (RELEASED / "chat_template.jinja").read_text()
    for tools in (None, TOOLS):
        for add_vision_id in (False, True):
            for add_generation_prompt in (False, True):
                options = {
                    "tools": tools,
                    "add_vision_id": add_vision_id,
                    "add_generation_prompt": add_generation_prompt,
                    "tokenize": False,
                }
                render = processor.tokenizer.apply_chat_template
                expected = render(CONVERSATIONS[name], chat_template=released, **options)
                assert render(CONVERSATIONS[name], chat_template=processor.chat_template, **options) == expected


def test_template_numbers_media_and_joins_tool_results(processor):
    """Fixed strings, because the released template may be absent."""

    def render(name, **options):
        return processor.apply_chat_template(CONVERSATIONS[name], tokenize=False, **options)

    assert render("text around images", add_vision_id=True) == (
        "<|im_start|>user\naPicture 1: <|vision_start|><|image_pad|><|vision_end|>bPicture 2: "
        "<|vision_start|><|image_pad|><|vision_end|>c<|im_end|>\n<|im_start|>assistant\nd<|im_end|>\n"
    )
    assert "<|im_start|>user\n<tool_response>\n1\n</tool_response>\n<tool_response>\n" in render(
        "two calls after text, two results"
    )
    assert 'see\n<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>\n<tool_call>' in render(
        "two calls after text, two results"
    )


def test_the_command_writes_a_checkpoint_and_prints_where(tmp_path):
    app = typer.Typer()
    app.command()(tiny_command)
    result = CliRunner().invoke(app, [str(tmp_path / "made"), "--moe", "--seed", "3"])
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == str(tmp_path / "made")
    assert json.loads((tmp_path / "made" / "config.json").read_text())["model_type"] == "qwen3_vl_moe"


def test_sizes_are_free(tmp_path):
    directory = make_tiny(tmp_path, hidden_size=32, vision_depth=3, head_dim=32, deepstack_visual_indexes=(0, 2))
    model = AutoModelForImageTextToText.from_pretrained(directory)
    assert model.config.text_config.hidden_size == 32
    assert model.config.text_config.rope_parameters["mrope_section"] == [6, 5, 5]
    assert len(model.model.visual.deepstack_merger_list) == 2
