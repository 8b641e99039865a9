"""A model answers the questions of a tree: the files fit their questions, and boxes come out in pixels."""

import json

import numpy as np
import pytest
from flare_cases import CASES, MORE, SIZE, Case
from PIL import Image

from qwenvl_ft.data.media.images import MediaPolicy
from qwenvl_ft.evaluation.generate import generate
from qwenvl_ft.flare.catalog import FLARE_DATASETS
from qwenvl_ft.flare.layout import find_questions
from qwenvl_ft.flare.predict import in_pixels, main, predict
from qwenvl_ft.flare.score import main as score


def test_a_model_answers_every_question_and_is_scored(full_tree, tiny_dir, tmp_path, capsys):
    """The answers are those of `generate`, and the score command takes the files as they are."""
    out = tmp_path / "predictions"
    words = [
        "--model",
        str(tiny_dir),
        "--datasets",
        "all",
        "--input_dir",
        str(full_tree.base),
        "--output_dir",
        str(out),
    ]
    assert main([*words, "--max_new_tokens", "3", "--torch_dtype", "float32"]) == 0
    files = sorted(out.glob("*.json"))
    assert len(files) == 19
    assert sum(len(json.loads(file.read_text())) for file in files) == len([*CASES, *MORE])
    assert score(["--predictions", str(out), "--input_dir", str(full_tree.base)]) == 0
    assert "neojaundice" in capsys.readouterr().out
    (record,) = json.loads((out / "CMMD_questions_val.json").read_text())
    assert record["ImageName"] == ["imagesVal/CMMD_0_0.png", "imagesVal/CMMD_0_1.png"]
    from qwenvl_ft.model.load import load_model, load_processor

    model, processor = load_model(tiny_dir, torch_dtype="float32"), load_processor(tiny_dir)
    folder = full_tree.folder("CMMD", "validation-hidden")
    prompt = {
        "image": [str(folder / name) for name in record["ImageName"]],
        "conversations": [{"from": "human", "value": "<image>\n<image>\n" + record["Question"]}],
    }
    assert generate(model, processor, [prompt], max_new_tokens=3) == [record["prediction"]]


def answered(text):
    return lambda prompts: [text] * len(prompts)


def questions_of(tree, case, count=1):
    tree.fill([case] * count, "validation-public", "val", answered=False)
    return find_questions(tree.base, FLARE_DATASETS[case.dataset], "val", answered=False)


def test_thousandths_come_out_as_pixels_of_the_stored_image(tree):
    """An image of 200 x 180."""
    assert SIZE == (200, 180)
    questions = questions_of(tree, Case("BUSI-det", "detection", "", "detection"))
    (record,), _ = predict(questions, answered("```json\n[[500, 500, 1000, 1000]]\n```"), coordinates="norm1000")
    assert record["prediction"] == "[[100.0, 90.0, 200.0, 180.0]]"
    (record,), _ = predict(questions, answered("[[500, 500, 1000, 1000]]"))
    assert record["prediction"] == "[[500, 500, 1000, 1000]]"
    (record,), _ = predict(questions, answered("I cannot tell."), coordinates="norm1000")
    assert record["prediction"] == "I cannot tell."
    image = str(questions.folder / "imagesVal" / "BUSI-det_0_0.png")
    assert in_pixels('{"1": [[0, 0, 500, 500]], "X": []}', image) == '{"1": [[0.0, 0.0, 100.0, 90.0]]}'


def test_other_tasks_keep_their_numbers(tree):
    questions = questions_of(tree, Case("neurips22cell", "counting", "", "counting"))
    (record,), _ = predict(questions, answered("[1, 2, 3, 4]"), coordinates="norm1000")
    assert record["prediction"] == "[1, 2, 3, 4]"


def test_a_question_that_cannot_be_asked_gets_an_empty_prediction(tree):
    questions = questions_of(tree, Case("retino", "classification", "", "classification"), count=3)
    (questions.folder / "imagesVal/retino_1_0.png").write_text("no image")
    asked = []

    def answer(prompts):
        asked.extend(prompts)
        return ["A", "B"]

    records, not_asked = predict(questions, answer)
    assert [record["prediction"] for record in records] == ["A", "", "B"]
    assert not_asked == 1
    assert all("gpt" not in json.dumps(prompt) for prompt in asked)


def test_the_reason_why_a_question_is_not_asked_is_said_once_with_its_remedy(tree, capsys):
    questions = questions_of(tree, Case("retino", "classification", "", "classification"), count=2)
    for path in questions.folder.rglob("*.png"):
        Image.fromarray(np.full((9, 9), 4000, dtype=np.uint16)).save(path)
    assert predict(questions, lambda prompts: [])[1] == 2
    said = capsys.readouterr().err
    assert said.count("retino: not asked, e.g.: image ") == 1
    assert "mode I;16, found 4000 to 4000" in said
    assert "high_bit_depth to window" in said


@pytest.mark.parametrize(("limit", "asked"), [(200 * 180, 1), (200 * 180 - 1, 0)])
def test_images_above_the_limit_are_not_asked_about(tree, limit, asked):
    questions = questions_of(tree, Case("retino", "classification", "", "classification"))
    (record,), not_asked = predict(questions, answered("A"), policy=MediaPolicy(max_image_pixels=limit))
    assert (record["prediction"], not_asked) == ("A" * asked, 1 - asked)


def test_the_limit_reaches_the_encoder(full_tree, tiny_dir, tmp_path, monkeypatch):
    """The images of the tree have 36,000 pixels; a limit of 36,000 is kept by the check and by the generation."""
    from qwenvl_ft.evaluation import generate as module

    policies = []
    keep = module.Encoder.prompt
    monkeypatch.setattr(module.Encoder, "prompt", lambda self, r: policies.append(self.policy) or keep(self, r))
    words = ["--model", str(tiny_dir), "--datasets", "retino", "--input_dir", str(full_tree.base), "--output_dir"]
    limited = ["--max_image_pixels", "36000", "--max_new_tokens", "2", "--torch_dtype", "float32"]
    assert main([*words, str(tmp_path / "out"), *limited]) == 0
    assert [policy.max_image_pixels for policy in policies] == [36000]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--datasets", "retina"], "unknown FLARE data set 'retina'. Did you mean 'retino'"),
        (["--split", "dev"], "unknown split 'dev'"),
        (["--split", "test"], "there are no test questions below"),
        (["--model", "nowhere"], "nowhere"),
    ],
)
def test_a_users_error_is_one_line(full_tree, tiny_dir, tmp_path, capsys, words, message):
    base = ["--model", str(tiny_dir), "--input_dir", str(full_tree.base), "--output_dir", str(tmp_path / "out")]
    assert main([*base, *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
