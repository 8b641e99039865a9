"""`serve-check` agrees with a right server, and finds each fault that is planted in one.

The server is the test's own (served_cases.py).
"""

import json
import shutil

import pytest
import torch
from cases import picture
from served_cases import STEPS, PlainServer, check, serving
from video_cases import asked, film

from qwenvl_ft.cli.main import main
from qwenvl_ft.data.sources.registry import DATASETS
from qwenvl_ft.evaluation.differences import first_difference, prompt_difference
from qwenvl_ft.evaluation.served import is_tie
from qwenvl_ft.export.serving import export
from qwenvl_ft.model.load import load_model, load_processor
from qwenvl_ft.model.tiny import make_tiny
from qwenvl_ft.recipe.schema import TunerConfig
from qwenvl_ft.tuning.prepare import prepare_model

LLM = {"freeze_llm": False, "freeze_vit": True, "freeze_aligner": True, "lora_rank": 4, "lora_alpha": 16}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """An adapter that changes answers, with processor and recipe, beside its base model and records to ask."""
    root = tmp_path_factory.mktemp("trained")
    make_tiny(root / "base", initializer_range=0.2)
    model = load_model(root / "base", torch_dtype="float32", attn_impl="sdpa")
    torch.manual_seed(0)
    model = prepare_model(model, TunerConfig(**LLM))
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value += torch.randn(value.shape) * 0.1
    model.save_pretrained(root / "run")
    load_processor(root / "base", max_pixels=4096).save_pretrained(root / "run")
    (root / "run" / "recipe.yaml").write_text("template: {system_prompt: Be brief.}\n")
    export(root / "run", root / "served", "vllm")
    records = []
    for number in range(3):
        picture(160, 128, number).save(root / f"{number}.png")
        turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A blur."}]
        records.append({"image": str(root / f"{number}.png"), "conversations": turns})
    records.append({"conversations": [{"from": "human", "value": "Hello."}, {"from": "gpt", "value": "Hi."}]})
    (root / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return root


@pytest.fixture(scope="module")
def filmed(tmp_path_factory):
    """Whole models of two families with their exports, and records that ask about videos."""
    root = tmp_path_factory.mktemp("filmed")
    for family in ("qwen3_vl", "qwen3_5"):
        make_tiny(root / family, family=family, initializer_range=0.2)
        export(root / family, root / f"{family}-served", "vllm")
    long, short = str(film(root / "long.mp4")), str(film(root / "short.mp4", frames=13, size=(72, 80)))
    frames = [str(root / f"{number}.png") for number in range(5)]
    for number, path in enumerate(frames):
        picture(64, 48, number).save(path)
    records = [asked(long), asked(frames), asked(short, short, images=frames[:1]), asked(), asked(long, short)]
    (root / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return root


@pytest.mark.parametrize("given", [{}, {"ids": False}, {"logprobs": False}], ids=str)
def test_a_server_of_the_export_agrees(trained, capsys, given):
    server = PlainServer(trained / "base", trained / "served", trained / "served", **given)
    code, result = check(trained, server, capsys)
    assert (code, result["agree"], len(result["records"])) == (0, 4, 4)
    assert {one["first"] for one in result["records"]} == {None}
    gaps = [one["logprob_gap"] for one in result["records"]]
    assert gaps == [None] * 4 if given == {"logprobs": False} else max(gap or 0 for gap in gaps) < 1e-4
    assert given or None not in gaps
    assert server.asked[0]["temperature"] == 0
    assert [turn["role"] for turn in server.asked[0]["messages"]] == ["user"]


FAULTS = {
    "without the adapter": ({"adapter": None}, "does not apply the adapter"),
    "other pixel limits": ({"max_pixels": 65536}, "other pixel limits: 20 tokens of images, not"),
    "another template": ({"processor": "base", "max_pixels": 4096}, "renders another prompt"),
    "other pixel limits, without token ids": ({"max_pixels": 65536, "ids": False}, "other pixel limits, another chat"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_planted_fault_is_found(trained, capsys, fault):
    change, cause = FAULTS[fault]
    settings = {"adapter": trained / "served", "processor": trained / "served"} | change
    if settings["processor"] == "base":
        settings["processor"] = trained / "base"
    code, result = check(trained, PlainServer(trained / "base", **settings), capsys)
    assert code == 1
    assert result["agree"] < 4
    causes = [one["cause"] for one in result["records"] if not one["agrees"]]
    assert all(cause in found for found in causes), causes
    if fault.startswith("other pixel limits"):
        assert result["records"][3]["agrees"], "the record without an image"


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen3_5"])
def test_videos_are_asked_about_with_the_frames_of_training(filmed, capsys, family):
    """A file, an odd number of frames, and a video twice beside an image; two videos that differ are not asked."""
    server = PlainServer(filmed / f"{family}-served")
    code, result = check(filmed, server, capsys, model=family)
    assert (code, result["agree"], len(result["records"])) == (0, 4, 4)
    assert max(one["logprob_gap"] for one in result["records"]) < 1e-4
    (left,) = result["not_asked"]
    assert left["source"].endswith("data.jsonl:5")
    assert "show different frames" in left["reason"]
    chosen = server.asked[0]["media_io_kwargs"]["video"]
    assert (chosen["fps"], chosen["frames_indices"]) == (10.0, [0, 6, 12, 17, 23, 29])
    assert "media_io_kwargs" not in server.asked[3]


@pytest.mark.parametrize("thinking", [False, True])
def test_the_thinking_switch_of_the_run_is_that_of_its_prompts(filmed, tmp_path, capsys, thinking):
    shutil.copytree(filmed / "qwen3_5", tmp_path / "run")
    (tmp_path / "run" / "recipe.yaml").write_text(f"template: {{enable_thinking: {str(thinking).lower()}}}\n")
    (tmp_path / "data.jsonl").write_text(json.dumps(asked()) + "\n")
    for served in (False, True):
        code, _ = check(tmp_path, PlainServer(filmed / "qwen3_5-served", thinking=served), capsys)
        assert code == (served != thinking)


def tool(name):
    parameters = {"type": "object", "properties": {"part": {"type": "string"}}}
    return {"type": "function", "function": {"name": name, "description": "Measures.", "parameters": parameters}}


@pytest.mark.parametrize("maker", ["vllm", "sglang"])
def test_tools_are_those_of_the_record_or_else_of_the_run(filmed, tmp_path, capsys, maker):
    """The last record also has a call of a tool and its result before the answer."""
    shutil.copytree(filmed / "qwen3_vl", tmp_path / "run")
    (tmp_path / "run" / "recipe.yaml").write_text(json.dumps({"template": {"tools_prompt": [tool("weigh")]}}))
    question, answer = {"role": "user", "content": "How long?"}, {"role": "assistant", "content": "Six."}
    call = {"type": "function", "function": {"name": "measure", "arguments": {"part": "é"}}}
    called = [
        question,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "6"},
        answer,
    ]
    records = [
        {"messages": [question, answer]},
        {"messages": [question, answer], "tools": [tool("measure")]},
        {"messages": called, "tools": [tool("measure")]},
    ]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    server = PlainServer(filmed / "qwen3_vl-served", maker=maker)
    code, result = check(tmp_path, server, capsys)
    assert (code, [one["cause"] for one in result["records"]]) == (0, ["", "", ""])
    assert [body["tools"][0]["function"]["name"] for body in server.asked] == ["weigh", "measure", "measure"]


def test_records_with_limits_of_their_own_are_not_asked(filmed, tmp_path, capsys):
    image = {"type": "image", "image": str(filmed / "0.png"), "max_pixels": 2048}
    video = {"type": "video", "video": str(filmed / "long.mp4"), "max_pixels": 2048}
    text = {"type": "text", "text": "What is it?"}
    answer = {"role": "assistant", "content": "It."}
    records = [{"messages": [{"role": "user", "content": [medium, text]}, answer]} for medium in (image, video)]
    records.append({"messages": [{"role": "user", "content": [{**image, "max_pixels": None}, text]}, answer]})
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    server = PlainServer(filmed / "qwen3_vl-served")
    code, result = check(tmp_path, server, capsys, model=filmed / "qwen3_vl")
    assert (code, result["agree"], len(server.asked)) == (0, 1, 1)
    assert [left["source"][-1] for left in result["not_asked"]] == ["1", "2"]
    assert {left["reason"] for left in result["not_asked"]} == {
        "the record has pixel limits of its own, which a request cannot carry"
    }


def test_records_are_read_as_the_recipe_of_the_run_says(filmed, tmp_path, capsys, monkeypatch):
    """A registered data set, a path that starts at the media root, and the limit on images."""
    monkeypatch.setitem(DATASETS, "own_serve", {})  # removed at the end
    shutil.copytree(filmed / "qwen3_vl", tmp_path / "run")
    (tmp_path / "data.jsonl").write_text(json.dumps(asked(images=["0.png"])) + "\n")
    data = {"media_root": str(filmed), "datasets": {"own_serve": {"annotation_path": str(tmp_path / "data.jsonl")}}}
    server = PlainServer(filmed / "qwen3_vl-served")
    for more, expected, said in (({}, 0, None), ({"max_image_pixels": 3000}, 2, "data.max_image_pixels")):
        (tmp_path / "run" / "recipe.yaml").write_text(json.dumps({"data": data | more | {"of_another_release": 1}}))
        code, result = check(tmp_path, server, capsys, "--data", "own_serve")
        assert code == expected, result
        assert said is None or said in result
    (tmp_path / "run" / "recipe.yaml").unlink()
    code, error = check(tmp_path, server, capsys)
    assert code == 2
    assert "0.png" in error, "vacuous: the image is found without the media root"


@pytest.mark.parametrize("option", ["--limit", "--max-new-tokens"])
def test_numbers_below_1_are_refused(option, capsys):
    arguments = ["--url", "http://127.0.0.1:9/v1", "--model", "m", "--data", "d.jsonl"]
    assert main(["serve-check", *arguments, option, "0"]) == 2
    assert option in capsys.readouterr().err


VIDEO_FAULTS = {
    "other pixel limits": ({"video": {"max_pixels": 16384}}, "other pixel limits: 6 tokens of videos, not 18"),
    "frames at a rate of its own": (
        {"video": {"ignores": True}},
        "other frames of a video, or at other times: 3 groups at 0.5 s, 2.5 s, 4.5 s, where the trained model has 3 at "
        "0.3 s, 1.4 s, 2.6 s",
    ),
    "frames in another order": ({"video": {"backwards": True}}, ""),
    "a template with vision tokens around a video": ({"processor": "qwen3_vl"}, "a second pair of vision tokens"),
    "other pixel limits, without token ids": (
        {"video": {"max_pixels": 16384}, "ids": False},
        "other frames of a video",
    ),
}


@pytest.mark.parametrize("fault", VIDEO_FAULTS)
def test_each_planted_fault_of_videos_is_found(filmed, capsys, fault):
    change, cause = VIDEO_FAULTS[fault]
    if "processor" in change:
        change = {"processor": filmed / change["processor"]}
    server = PlainServer(filmed / "qwen3_vl-served", **change)
    code, result = check(filmed, server, capsys, model="qwen3_vl")
    assert code == 1
    assert not result["records"][0]["agrees"]
    assert cause in result["records"][0]["cause"]
    assert bool(cause) == bool(result["records"][0]["cause"]), "the prompts are equal, and only the pixels differ"
    assert result["records"][3]["agrees"], "the record without a video"


def test_videos_that_a_server_moves_to_the_front_are_another_prompt(filmed, tmp_path, capsys):
    """Their frames and times are those of training, so the cause must not be other frames."""
    record = asked(str(filmed / "long.mp4")) | {"conversations": [{"from": "human", "value": "What moves? <video>"}]}
    (tmp_path / "data.jsonl").write_text(json.dumps(record) + "\n")
    for first in (False, True):
        server = PlainServer(filmed / "qwen3_vl-served", video={"first": first})
        code, result = check(tmp_path, server, capsys, model=filmed / "qwen3_vl")
        assert code == first
    assert "renders another prompt" in result["records"][0]["cause"]


DISABLED = (  # vLLM 0.32
    "Per-request media_io_kwargs are disabled by default because they can change multimodal media loading resource "
    "usage. Start the server with --trust-request-mm-kwargs only when clients are trusted."
)
SERVERS = {
    "SGLang": ({"maker": "sglang"}, "only vLLM takes the frames of videos that training shows; this server is sglang"),
    "an unnamed server": ({"maker": None}, "this server is another one"),
    "vLLM without trust": ({"video": {"refuses": DISABLED}}, "start vLLM with --trust-request-mm-kwargs"),
}


@pytest.mark.parametrize("name", SERVERS)
def test_records_with_videos_that_a_server_does_not_take_are_counted(filmed, capsys, name):
    settings, reason = SERVERS[name]
    server = PlainServer(filmed / "qwen3_vl-served", **settings)
    code, result = check(filmed, server, capsys, model="qwen3_vl")
    assert (code, result["agree"], len(result["records"])) == (0, 1, 1)
    assert [left["source"][-1] for left in result["not_asked"]] == ["1", "2", "3", "5"]
    assert all(reason in left["reason"] for left in result["not_asked"])
    assert len(server.asked) == (2 if name.startswith("vLLM") else 1), "frames are sent once at most"
    code, error = check(filmed, server, capsys, "--limit", "2", model="qwen3_vl")
    assert code == 2
    assert "cannot be asked about any record: 2 from " in error
    assert reason in error


def test_no_frame_is_decoded_for_a_server_that_takes_none(filmed, tmp_path, capsys):
    (tmp_path / "damaged.mp4").write_bytes(b"no video")
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(asked(*paths)) + "\n" for paths in ((), ["damaged.mp4"])))
    for maker, expected in (("sglang", 0), ("vllm", 2)):
        server = PlainServer(filmed / "qwen3_vl-served", maker=maker)
        code, _ = check(tmp_path, server, capsys, model=filmed / "qwen3_vl")
        assert code == expected


def test_another_refusal_of_frames_is_shown_as_the_server_said_it(filmed, capsys):
    server = PlainServer(filmed / "qwen3_vl-served", video={"refuses": "media_io_kwargs: fps is no number"})
    code, error = check(filmed, server, capsys, model="qwen3_vl")
    assert code == 2
    assert "media_io_kwargs: fps is no number" in error
    assert "--trust-request-mm-kwargs" not in error


def test_the_report_counts_what_was_not_asked(filmed, capsys):
    with serving(PlainServer(filmed / "qwen3_vl-served", video={"refuses": DISABLED})) as url:
        arguments = ["--model", str(filmed / "qwen3_vl"), "--data", str(filmed / "data.jsonl")]
        code = main(["serve-check", "--url", url, "--max-new-tokens", str(STEPS), *arguments])
    lines = capsys.readouterr().out.splitlines()
    assert code == 0
    data = filmed / "data.jsonl"
    assert lines[0].startswith(f"agrees  {data}:4")
    assert lines[1].startswith(f"not asked  4 from {data}:1 on: start vLLM with --trust-request-mm-kwargs")
    assert lines[2] == "1 of 1 records agree"


def test_the_report_is_for_people(trained, capsys):
    with serving(PlainServer(trained / "base", None, trained / "served")) as url:
        arguments = ["--model", str(trained / "run"), "--data", str(trained / "data.jsonl"), "--limit", "1"]
        code = main(["serve-check", "--url", url, "--max-new-tokens", str(STEPS), *arguments])
    lines = capsys.readouterr().out.splitlines()
    assert code == 1
    assert lines[0].startswith("DIFFERS")
    assert lines[-1] == "0 of 1 records agree"


def test_no_server_is_one_line(trained, capsys):
    arguments = ["--model", str(trained / "run"), "--data", str(trained / "data.jsonl")]
    assert main(["serve-check", "--url", "http://127.0.0.1:9/v1", *arguments]) == 2
    error = capsys.readouterr().err
    assert "does not answer" in error
    assert error.count("\n") == 1


def test_where_answers_and_prompts_differ(processor):
    assert first_difference([5, 6, 7], [5, 8], {9}) == 1
    assert first_difference([5], [5, 6], {9}) == 1
    assert first_difference([5, 9], [5, 10], {9, 10}) is None
    assert is_tie(0.05, None, 0.1)
    assert not is_tie(0.05, 0.3, 0.1), "the tokens before have other probabilities, so it is another model"
    assert not is_tie(0.2, 0.01, 0.1)
    tokenizer = processor.tokenizer
    pad = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    ours = [1, pad, pad, 2]
    assert prompt_difference(ours, [1, pad, 2], 4, tokenizer) == "", "placeholders not expanded"
    assert "limits: 1 tokens of images, not 2" in prompt_difference(ours, [1, pad, 2], 3, tokenizer)
    assert prompt_difference([1, 2], None, None, tokenizer) == ""
