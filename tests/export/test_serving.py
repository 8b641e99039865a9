"""What `export` writes is applied whole by the rules of the engines' loaders; the rest is refused, or merged."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import KINDS, picture
from engine_cases import landed, sglang_updates, shards_of, vllm_updates
from run_cases import short_run, write_questions
from safetensors.torch import load_file, save_file
from transformers import Qwen3VLProcessor
from video_cases import asked

from qwenvl_ft import train
from qwenvl_ft.cli.main import main
from qwenvl_ft.data.encode.draft import ENCLOSED_VIDEO, VIDEO_PAD, VISION_END, VISION_START
from qwenvl_ft.data.encode.encoder import Encoder
from qwenvl_ft.errors import CheckpointError
from qwenvl_ft.export.chat_template import with_system_prompt
from qwenvl_ft.export.engines import ENGINES, silent_losses
from qwenvl_ft.export.merge import merge
from qwenvl_ft.export.released import require_released
from qwenvl_ft.export.serving import export
from qwenvl_ft.model.load import load_model, load_processor
from qwenvl_ft.recipe.load import load_recipe
from qwenvl_ft.recipe.schema import TunerConfig
from qwenvl_ft.tuning.prepare import prepare_model
from qwenvl_ft.upstream.processors import CAP

ROOT = Path(__file__).resolve().parents[2]
LLM = {"freeze_llm": False, "freeze_vit": True, "freeze_aligner": True, "lora_rank": 4, "lora_alpha": 12}
VISION = LLM | {"freeze_llm": True, "freeze_vit": False, "freeze_aligner": False}
SHARED = r"model\.language_model\.layers\.\d+\.mlp\.shared_expert\.(gate|up|down)_proj"
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
SAVED = {
    "LoRA of attention and MLP": ("dense", LLM),
    "LoRA with `use_rslora`, `rank_pattern`, `alpha_pattern`": (
        "dense",
        LLM | {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 5}},
    ),
    "LoRA of single projections": ("dense", LLM | {"target_modules": ["v_proj", "up_proj"]}),
    "LoRA of the language head": ("dense", LLM | {"target_modules": ["lm_head", "q_proj"]}),
    "LoRA of vision tower or aligner": ("dense", VISION),
    "LoRA of experts": ("moe", LLM | {"target_parameters": EXPERTS, "alpha_pattern": {"experts.down_proj": 7}}),
    "LoRA of one matrix of the experts": ("moe", LLM | {"target_parameters": EXPERTS[1:]}),
    "LoRA of the router": ("moe", LLM | {"target_parameters": ["mlp.gate.weight"]}),
    "Qwen3.5: LoRA of full attention, MLP and the delta nets' `out_proj`": (
        "qwen3_5",
        LLM | {"target_modules": ["q_proj", "v_proj", "down_proj", "up_proj", "out_proj"]},
    ),
    "Qwen3.5: LoRA of the delta nets' input": (
        "qwen3_5",
        LLM | {"target_modules": ["in_proj_z", "in_proj_a", "k_proj"]},
    ),
    "Qwen3.5 MoE: LoRA of experts": ("qwen3_5_moe", LLM | {"target_modules": ["o_proj"], "target_parameters": EXPERTS}),
    "Qwen3.5 MoE: LoRA of the shared expert": ("qwen3_5_moe", LLM | {"target_regex": SHARED}),
    "`use_dora`": ("dense", LLM | {"use_dora": True}),
    "modules in full beside LoRA": ("dense", LLM | {"modules_to_save": ["model.visual.merger"]}),
    "another method of peft": ("dense", {"train_type": "vera", "vera_rank": 4, **LLM}),
    "`adapter`, `reft`": ("dense", {"train_type": "adapter", "adapter_length": 4, **LLM}),
}
"""Row of the table in docs/inference.md -> (model, tuner section) of an adapter."""
SERVED = {"vllm": lambda folder: vllm_updates(folder, tower=True), "sglang": lambda folder: sglang_updates(folder)}


@pytest.fixture(scope="module")
def adapters(checkpoints, tmp_path_factory):
    """Map rows to the folder of an adapter whose weights differ from their initial values."""
    root, folders = tmp_path_factory.mktemp("adapters"), {}
    for number, (name, (kind, settings)) in enumerate(SAVED.items()):
        torch.manual_seed(number)
        model = load_model(checkpoints[kind], torch_dtype="float32", attn_impl="sdpa")
        model = prepare_model(model, TunerConfig(**settings))
        with torch.no_grad():
            for value in model.parameters():
                if value.requires_grad:
                    value += torch.randn(value.shape) * 0.05
        folders[name] = root / str(number)
        model.save_pretrained(folders[name])
    return folders


@pytest.fixture(scope="module")
def changes(adapters, checkpoints, tmp_path_factory):
    """Return a function from a row to name -> change of each changed weight, from the merged model."""
    root, known = tmp_path_factory.mktemp("merged"), {}

    def of(name):
        if name not in known:
            folder = merge(adapters[name], root / str(len(known))).folder
            before = load_file(checkpoints[SAVED[name][0]] / "model.safetensors")
            after = load_file(folder / "model.safetensors")
            old = {key: before.get(key, before["model.language_model.embed_tokens.weight"]) for key in after}
            known[name] = {key: after[key] - old[key] for key in after if not torch.equal(after[key], old[key])}
        return known[name]

    return of


def require_same(updates, wanted):
    nonzero = {name: value for name, value in updates.items() if value.abs().max() > 0}
    assert nonzero.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(nonzero[name].contiguous(), value, rtol=1e-3, atol=1e-6)


def table():
    """Return row -> engine -> cell of the table in docs/inference.md."""
    text = (ROOT / "docs/inference.md").read_text()
    lines = text.partition("| saved | vLLM | SGLang | peft | transformers |")[2].splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[: lines.index("")]]
    return {cells[0]: dict(zip(ENGINES, cells[1:], strict=True)) for cells in rows}


def test_the_table_has_a_row_for_every_case():
    assert set(table()) == {*SAVED, "whole model, merged model"}


@pytest.mark.parametrize("name", SAVED)
@pytest.mark.parametrize("engine", ENGINES)
def test_each_cell_of_the_table(adapters, changes, tmp_path, name, engine):
    cell = table()[name][engine]
    if cell.startswith("applied"):
        done = export(adapters[name], tmp_path / "out", engine)
        if engine in SERVED:
            updates = SERVED[engine](done.folder)
            if SAVED[name][0] == "qwen3_5_moe":  # stores its experts as [E, out, in]
                updates = {key: value.transpose(1, 2) if "experts" in key else value for key, value in updates.items()}
            require_same(updates, changes(name))
            flag = re.search(r"`(--[a-z-]+)`", cell)
            assert done.flags == ([flag[1]] if flag else [])
            assert all(flag in done.command for flag in done.flags)
    else:
        with pytest.raises(CheckpointError, match="--merge" if cell == "after merge" else "peft does not have|merge"):
            export(adapters[name], tmp_path / "out", engine)
        assert not list(tmp_path.iterdir()), "a refused export leaves something behind"
    if cell == "after merge" and engine == "transformers":
        assert export(adapters[name], tmp_path / "out", engine, merged=True).kind == "model"
    if cell == "refused":
        with pytest.raises(CheckpointError):
            export(adapters[name], tmp_path / "out", engine, merged=True)


def test_an_adapter_as_it_was_saved_is_not_applied_whole_and_silent_losses_says_so(adapters, changes):
    rows = {
        name: silent_losses(folder, {"dense": "qwen3_vl", "moe": "qwen3_vl_moe"}.get(SAVED[name][0], SAVED[name][0]))
        for name, folder in adapters.items()
    }
    assert rows["LoRA of attention and MLP"] == []
    require_same(vllm_updates(adapters["LoRA of attention and MLP"]), changes("LoRA of attention and MLP"))
    vision = rows["LoRA of vision tower or aligner"]
    assert [line.partition(" ")[0] for line in vision] == ["vLLM", "SGLang"]
    assert "as the base model" in vision[0]
    assert vllm_updates(adapters["LoRA of vision tower or aligner"]) == {}
    assert sglang_updates(adapters["LoRA of vision tower or aligner"]) == {}
    experts = rows["LoRA of experts"]
    assert len(experts) == 1
    assert experts[0].startswith("SGLang would answer without the update of")
    assert not any("experts" in key for key in sglang_updates(adapters["LoRA of experts"], experts=8))
    scaled = "LoRA with `use_rslora`, `rank_pattern`, `alpha_pattern`"
    assert "another scaling" in rows[scaled][0]
    with pytest.raises(LookupError, match="rank of"):
        sglang_updates(adapters[scaled])
    with pytest.raises(LookupError, match="half of"):
        vllm_updates(adapters["LoRA of one matrix of the experts"])


def test_peft_reads_the_plain_form_as_the_adapter(adapters, checkpoints, tmp_path):
    """The stacked form is peft's own, so plain peft is another judge of it."""
    from peft import PeftModel

    inputs = {"input_ids": torch.arange(5, 45)[None]}
    for number, name in enumerate(("LoRA of experts", "LoRA of one matrix of the experts")):
        export(adapters[name], tmp_path / str(number), "vllm")
        base = load_model(checkpoints["moe"], torch_dtype="float32", attn_impl="sdpa").eval()
        with torch.no_grad():
            plain = base(**inputs).logits
            adapted = PeftModel.from_pretrained(base, tmp_path / str(number)).eval()(**inputs).logits
            base = load_model(checkpoints["moe"], torch_dtype="float32", attn_impl="sdpa").eval()
            trained = PeftModel.from_pretrained(base, adapters[name]).eval()(**inputs).logits
        torch.testing.assert_close(adapted, trained, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(plain, trained, atol=1e-3), "vacuous: the adapter changes nothing"


@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_of_a_model_lands_and_fills_the_engines_parameters(checkpoints, tmp_path, kind):
    for engine in ("vllm", "sglang", "transformers"):
        done = export(checkpoints[kind], tmp_path / engine, engine)
        names = list(load_file(done.folder / "model.safetensors"))
        wanted = shards_of(json.loads((done.folder / "config.json").read_text()))
        filled, left = landed(names)
        assert not left
        assert filled == wanted
        for name in ("preprocessor_config.json", "video_preprocessor_config.json", "chat_template.jinja"):
            assert (done.folder / name).is_file(), name
    for name in names:
        assert landed([other for other in names if other != name])[0] != wanted, f"vacuous: {name} may be missing"
        assert landed([*names, name.replace("model.", "model.model.", 1) + "2"]) != (wanted, []), (
            "vacuous: any name lands"
        )


FAULTS = {
    "a name": (lambda saved: saved.update({"model.extra.weight": torch.zeros(1)}), "do not read"),
    "a missing tensor": (lambda saved: saved.pop("model.visual.pos_embed.weight"), "lacks 1 tensors"),
    "a second copy of the tied head": (
        lambda saved: saved.update({"lm_head.weight": saved["model.language_model.embed_tokens.weight"].clone()}),
        "the first is lm_head.weight",
    ),
    "a shape": (
        lambda saved: saved.update({"model.visual.pos_embed.weight": torch.zeros(4, 4)}),
        r"has shape \(4, 4\)",
    ),
    "a dtype": (
        lambda saved: saved.update(
            {"model.visual.pos_embed.weight": saved["model.visual.pos_embed.weight"].bfloat16()}
        ),
        "the tensors are bfloat16",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_model_that_engines_would_misread_is_refused(checkpoints, tmp_path, fault):
    change, message = FAULTS[fault]
    saved = load_file(checkpoints["dense"] / "model.safetensors")
    assert require_released(checkpoints["dense"]) == len(saved)
    change(saved)
    save_file(saved, tmp_path / "model.safetensors")
    for name in ("config.json",):
        (tmp_path / name).write_text((checkpoints["dense"] / name).read_text())
    with pytest.raises(CheckpointError, match=message):
        require_released(tmp_path)


def test_transposed_experts_and_missing_fields_are_refused(checkpoints, tmp_path):
    saved = load_file(checkpoints["moe"] / "model.safetensors")
    name = "model.language_model.layers.0.mlp.experts.gate_up_proj"
    saved[name] = saved[name].transpose(1, 2).contiguous()
    save_file(saved, tmp_path / "model.safetensors")
    config = json.loads((checkpoints["moe"] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="gate_up_proj has shape"):
        require_released(tmp_path)
    for field in ("num_experts", "rope_theta", "norm_topk_prob"):
        text = {key: value for key, value in config["text_config"].items() if key != field}
        (tmp_path / "config.json").write_text(json.dumps(config | {"text_config": text}))
        with pytest.raises(CheckpointError, match=f"lacks text_config.{field}"):
            require_released(tmp_path)


def test_limits_frames_and_system_prompt_of_training_reach_the_engine(adapters, checkpoints, tmp_path, capsys):
    trained = tmp_path / "run"
    trained.mkdir()
    source = adapters["LoRA of attention and MLP"]
    for file in source.iterdir():
        (trained / file.name).write_bytes(file.read_bytes())
    load_processor(checkpoints["dense"], min_pixels=2048, max_pixels=4096, fps=1.0).save_pretrained(trained)
    (trained / "recipe.yaml").write_text("template: {system_prompt: \"Say 'so'.\"}\n")
    assert main(["export", str(trained), str(tmp_path / "out"), "--for", "vllm", "--images-per-prompt", "3"]) == 0
    printed = capsys.readouterr().out
    assert "--enable-lora --max-lora-rank 8" in printed
    assert f"--lora-modules out={tmp_path / 'out'}" in printed
    assert '"images_kwargs": {"size": {"shortest_edge": 2048, "longest_edge": 4096}}' in printed
    assert '--media-io-kwargs \'{"video": {"fps": 1.0' in printed
    assert "--limit-mm-per-prompt '{\"image\": 3}'" in printed
    assert f"--chat-template {tmp_path / 'out' / 'chat_template.jinja'}" in printed
    written = load_processor(tmp_path / "out")
    render = lambda messages: written.apply_chat_template(messages, add_generation_prompt=True)  # noqa: E731
    asked = [{"role": "user", "content": "hi"}]
    system = [{"role": "system", "content": "Say 'so'."}]
    assert render(asked) == load_processor(checkpoints["dense"]).apply_chat_template(
        [*system, *asked], add_generation_prompt=True
    )
    other = render([{"role": "system", "content": "Be brief."}, *asked])
    assert ("Be brief." in other, "so" in other) == (True, False)
    assert main(["export", str(trained), str(tmp_path / "out2"), "--for", "sglang"]) == 0
    assert '"image": {"size": {"shortest_edge": 2048, "longest_edge": 4096}}' in capsys.readouterr().out


SWITCHES = {
    "no thinking": ("enable_thinking: false", {"enable_thinking": False}),
    "thinking": ("enable_thinking: true, add_vision_id: false", {"enable_thinking": True}),
    "numbered media": ("add_vision_id: true", {"add_vision_id": True}),
    "both": ("add_vision_id: true, enable_thinking: false", {"enable_thinking": False, "add_vision_id": True}),
}
"""Name -> (section ``template`` of a recipe, what a server must be told)."""


@pytest.mark.parametrize("name", SWITCHES)
def test_the_switches_of_training_reach_the_engine(adapters, tmp_path, capsys, name):
    """A server that renders by the template's own defaults would write another prompt than training did."""
    section, switches = SWITCHES[name]
    trained = tmp_path / "run"
    shutil.copytree(adapters["Qwen3.5: LoRA of the delta nets' input"], trained)
    base = json.loads((trained / "adapter_config.json").read_text())["base_model_name_or_path"]
    load_processor(base).save_pretrained(trained)
    (trained / "recipe.yaml").write_text(f"template: {{{section}}}\n")
    flag = f"--default-chat-template-kwargs '{json.dumps(switches)}'"
    assert main(["export", str(trained), str(tmp_path / "out"), "--for", "vllm"]) == 0
    assert flag in capsys.readouterr().out
    assert main(["infer", "--model", str(trained), "--prompt", "Hi.", "--max-new-tokens", "1"]) == 0
    assert f"note: serve it with {flag}" in capsys.readouterr().err
    assert main(["export", str(trained), str(tmp_path / "whole"), "--for", "sglang", "--merge"]) == 0
    assert flag in capsys.readouterr().out
    render = load_processor(tmp_path / "out").apply_chat_template
    shown = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "hi"}]}]
    for switch, value in switches.items():
        told, other = (render(shown, add_generation_prompt=True, **{switch: is_on}) for is_on in (value, not value))
        assert told != other, "vacuous: the switch changes nothing"
    switches = {"enable_thinking": False} | switches
    encoder = Encoder(load_processor(base), **switches)
    ids = encoder.prompt(asked(images=[picture(64, 48)], question="hi"))["input_ids"].tolist()
    text = re.sub(r"(<\|image_pad\|>)+", "<|image_pad|>", encoder.processor.tokenizer.decode(ids))
    assert text == render(shown, add_generation_prompt=True, **switches)


def test_a_template_without_the_switch_gets_no_flag(adapters, checkpoints, tmp_path, capsys):
    trained = tmp_path / "run"
    shutil.copytree(adapters["LoRA of attention and MLP"], trained)
    load_processor(checkpoints["dense"]).save_pretrained(trained)
    (trained / "recipe.yaml").write_text("template: {enable_thinking: false, add_vision_id: false}\n")
    assert main(["export", str(trained), str(tmp_path / "out"), "--for", "vllm"]) == 0
    assert "--default-chat-template-kwargs" not in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["qwen3_5", "qwen3_5_moe"])
def test_a_qwen3_5_model_is_released_as_it_was_saved(checkpoints, tmp_path, kind):
    """Its experts are stored as [E, out, in], otherwise than those of Qwen3-VL, and it has no deepstack."""
    done = export(checkpoints[kind], tmp_path / "out", "vllm")
    saved = load_file(done.folder / "model.safetensors")
    assert require_released(done.folder) == len(saved)
    config = json.loads((done.folder / "config.json").read_text())
    for field in ("linear_conv_kernel_dim", "rope_parameters"):
        text = {key: value for key, value in config["text_config"].items() if key != field}
        (done.folder / "config.json").write_text(json.dumps(config | {"text_config": text}))
        with pytest.raises(CheckpointError, match=f"lacks text_config.{field}"):
            require_released(done.folder)
    if kind == "qwen3_5_moe":
        (done.folder / "config.json").write_text(json.dumps(config))
        name = next(name for name in saved if name.endswith("experts.gate_up_proj"))
        (done.folder / "model.safetensors").unlink()
        save_file(saved | {name: saved[name].transpose(1, 2).contiguous()}, done.folder / "model.safetensors")
        with pytest.raises(CheckpointError, match="gate_up_proj has shape"):
            require_released(done.folder)


@pytest.mark.parametrize("row", ["LoRA of attention and MLP", "Qwen3.5: LoRA of the delta nets' input"])
@pytest.mark.parametrize("engine", [*ENGINES, "merge"])
def test_videos_are_written_as_in_training(adapters, checkpoints, tmp_path, engine, row):
    """Processors since transformers 5.10 keep the vision tokens of a template; training has none around a video."""
    source, base = adapters[row], checkpoints[SAVED[row][0]]
    if engine == "merge":
        folder = merge(source, tmp_path / "out").folder
    else:
        folder = export(source if engine == "peft" else base, tmp_path / "out", engine).folder
    frames = [picture(64, 48, seed) for seed in range(5)]
    question = {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "What moves?"}]}

    def plain_tokens(processor):
        text = processor.apply_chat_template([question], add_generation_prompt=True, enable_thinking=False)
        metadata = [{"fps": 2.0, "frames_indices": list(range(5)), "total_num_frames": 5}]
        pixels = [np.stack([np.asarray(frame) for frame in frames])]
        made = processor(text=[text], videos=pixels, video_metadata=metadata, do_sample_frames=False)
        return list(made["input_ids"][0])

    released, exported = load_processor(base), load_processor(folder)
    trained = Encoder(released).prompt(asked(frames))["input_ids"].tolist()
    keeps = hasattr(Qwen3VLProcessor, "replace_video_token")
    assert (plain_tokens(exported) == trained) == (engine != "sglang" or not keeps)
    assert (plain_tokens(released) != trained) == keeps, "vacuous: nothing changes"
    assert Encoder(exported).prompt(asked(frames))["input_ids"].tolist() == trained
    for part in ("input_ids", "labels"):
        assert torch.equal(Encoder(exported)(asked(frames))[part], Encoder(released)(asked(frames))[part])
    assert (ENCLOSED_VIDEO in exported.chat_template) == (engine == "sglang")


def test_sglang_gets_the_released_template_of_a_merged_model_too(adapters, checkpoints, tmp_path, capsys):
    merged = merge(adapters["LoRA of attention and MLP"], tmp_path / "merged").folder
    assert ENCLOSED_VIDEO not in load_processor(merged).chat_template
    assert main(["export", str(merged), str(tmp_path / "out"), "--for", "sglang"]) == 0
    assert "SGLang can show a video to the model otherwise than training did" in capsys.readouterr().out
    assert load_processor(tmp_path / "out").chat_template == load_processor(checkpoints["dense"]).chat_template
    assert main(["export", str(merged), str(tmp_path / "vllm"), "--for", "vllm"]) == 0
    said = capsys.readouterr().out
    assert "SGLang" not in said
    assert "left as it is" not in said
    processor = load_processor(merged)
    processor.chat_template = processor.chat_template.replace(VIDEO_PAD, "<|video_' + 'pad|>")
    processor.save_pretrained(merged)
    assert main(["export", str(merged), str(tmp_path / "pieces"), "--for", "sglang"]) == 0
    assert "SGLang may not find the videos of a prompt" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["export", "merge"])
def test_a_template_whose_videos_cannot_be_changed_is_named(adapters, checkpoints, tmp_path, capsys, command):
    """The text with which a released template writes a video may be in several pieces in another one."""
    trained = tmp_path / "run"
    shutil.copytree(adapters["LoRA of attention and MLP"], trained)
    processor = load_processor(checkpoints["dense"])
    released = processor.chat_template
    pieces = released.replace(ENCLOSED_VIDEO, "' + '".join((VISION_START, VIDEO_PAD, VISION_END)))
    images_only = released.replace(ENCLOSED_VIDEO, "")
    assert released not in (pieces, images_only)
    for number, (template, named) in enumerate(((pieces, True), (released, False), (images_only, False))):
        processor.chat_template = template
        processor.save_pretrained(trained)
        out = tmp_path / str(number)
        assert main([command, str(trained), str(out), *(["--for", "vllm"] if command == "export" else [])]) == 0
        assert ("The chat template was left as it is" in capsys.readouterr().out) == named
        assert (load_processor(out).chat_template == template) == (template != released)


def test_a_cap_on_frames_reaches_vllm_or_a_note_says_what_does_not(adapters, checkpoints, tmp_path, capsys):
    if CAP.missing():
        pytest.skip(CAP.missing())
    trained = tmp_path / "run"
    shutil.copytree(adapters["LoRA of attention and MLP"], trained)
    printed = []
    for number, limits in enumerate(({}, {"video_frame_max_pixels": 12 * 32 * 32})):
        load_processor(checkpoints["dense"], **limits).save_pretrained(trained)
        assert main(["export", str(trained), str(tmp_path / str(number)), "--for", "vllm"]) == 0
        printed.append(capsys.readouterr().out)
    assert '"cap_pixels_per_frame": true' in printed[1]
    assert "A frame of a video had at most 12 tokens in training." in printed[1]
    assert "cap_pixels_per_frame" not in printed[0]
    assert "A frame of a video" not in printed[0]


def test_a_system_prompt_with_quotes_and_braces_is_kept():
    assert '"a {{ b }} \\"c\\""' in with_system_prompt("", 'a {{ b }} "c"')


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--for", "vlm"], "unknown --for 'vlm'"),
        (["--for", "transformers"], "takes whole models. Add --merge"),
    ],
)
def test_errors_are_one_line(adapters, tmp_path, capsys, arguments, message):
    folder = adapters["LoRA of attention and MLP"]
    assert main(["export", str(folder), str(tmp_path / "out"), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_infer_and_the_end_of_a_run_say_what_would_be_left_out(adapters, checkpoints, tmp_path, capsys):
    folder = adapters["LoRA of vision tower or aligner"]
    asked = ["--prompt", "Hi.", "--max-new-tokens", "2"]
    assert main(["infer", "--model", str(folder), *asked]) == 0
    assert "note: vLLM would answer without the update of" in capsys.readouterr().err
    assert main(["infer", "--model", str(adapters["LoRA of attention and MLP"]), *asked]) == 0
    assert "note" not in capsys.readouterr().err
    data = write_questions(tmp_path, 2)
    for part, said in (("freeze_vit=false", True), ("freeze_llm=false", False)):
        tuner = ["tuner.train_type=lora", "tuner.freeze_vit=true", "tuner.freeze_aligner=true", "tuner.freeze_llm=true"]
        run = short_run(checkpoints["dense"], data, tmp_path / part, *tuner, f"tuner.{part}", "training.max_steps=1")
        train(load_recipe("base", overrides=run))
        lines = capsys.readouterr().out.splitlines()
        assert any(line.startswith("vLLM would answer without") for line in lines) == said


def test_the_reference_tells_one_expert_from_another(adapters, changes, tmp_path):
    name = "LoRA of experts"
    folder = export(adapters[name], tmp_path / "out", "sglang").folder
    saved = load_file(folder / "adapter_model.safetensors")
    swap = {"experts.0.": "experts.1.", "experts.1.": "experts.0."}
    turned = {re.sub(r"experts\.[01]\.", lambda found: swap[found[0]], key): value for key, value in saved.items()}
    save_file(turned, folder / "adapter_model.safetensors")
    with pytest.raises(AssertionError):
        require_same(sglang_updates(folder), changes(name))


def test_experts_as_earlier_releases_of_peft_saved_them(adapters, changes, tmp_path):
    """Up to 0.20, peft takes [E, out, in] for [E, in, out]: lora_A has the outputs, lora_B the inputs."""
    name, old = "LoRA of experts", tmp_path / "old"
    source = adapters[name]
    saved, turned, count = load_file(source / "adapter_model.safetensors"), {}, 8
    for key, value in saved.items():
        if ".mlp.experts" not in key:
            turned[key] = value
        elif "lora_A" in key:
            rows = value.reshape(count, -1, value.shape[1])  # [E, r, in]
            turned[key.replace("lora_A", "lora_B")] = rows.permute(2, 1, 0).flatten(1).contiguous()
        else:
            columns = value.reshape(value.shape[0], -1, count)  # [out, r, E]
            turned[key.replace("lora_B", "lora_A")] = columns.permute(2, 1, 0).flatten(0, 1).contiguous()
    old.mkdir()
    save_file(turned, old / "adapter_model.safetensors")
    (old / "adapter_config.json").write_text((source / "adapter_config.json").read_text())
    require_same(vllm_updates(export(old, tmp_path / "out", "vllm").folder), changes(name))
