"""Every validator refuses what the encoder refuses: check with and without a model, the gate, and FLARE's commands."""

import json

import pytest
from flare_cases import Tree
from look_cases import checked
from refusal_cases import LARGEST, REFUSALS, image, messages, write_media

from qwenvl_ft.assemble import build_datasets, build_processor
from qwenvl_ft.cli.main import main
from qwenvl_ft.data.conversation import Image, Source
from qwenvl_ft.data.encode.encoder import Encoder
from qwenvl_ft.data.media.images import MediaPolicy, image_size
from qwenvl_ft.data.media.refused import TooLarge, TooThin
from qwenvl_ft.data.readers import read_record
from qwenvl_ft.errors import DataError
from qwenvl_ft.flare.convert import main as convert
from qwenvl_ft.flare.image_check import ImageCheck
from qwenvl_ft.flare.validate import validate_file
from qwenvl_ft.look.reference import is_plain, plan_media, reference_processor, require_plain_texts
from qwenvl_ft.look.selection import target_recipe
from qwenvl_ft.training.data_gate import check_before_training

LIMIT = f"data.max_image_pixels={LARGEST}"
SOUND = image("a.png", id="sound")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("media")
    write_media(folder)
    return folder


@pytest.fixture(scope="module")
def path(folder):
    """One sound record, then one record for each refusal."""
    file = folder / "all.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in [SOUND, *(case.record for case in REFUSALS)]))
    return file


def reasons(report, path):
    """Return line -> reasons of its errors."""
    found = {}
    for fault in report.errors():
        found.setdefault(int(fault.where.removeprefix(f"{path}:")), []).append(fault.reason)
    return found


EXPECTED = {line: [case.reason] for line, case in enumerate(REFUSALS, 2)}


@pytest.mark.parametrize("case", REFUSALS, ids=[case.name for case in REFUSALS])
def test_the_encoder_refuses_the_record_in_training(case, folder, processor):
    encoder = Encoder(processor, policy=MediaPolicy(max_image_pixels=LARGEST))
    encoder(SOUND, str(folder))
    with pytest.raises(DataError):
        encoder(case.record, str(folder))


def test_check_without_a_model_finds_every_refusal_on_its_line(path):
    assert reasons(checked(path, LIMIT), path) == EXPECTED


def test_check_with_a_model_gives_the_same_reasons(path, tiny_dir):
    assert reasons(checked(path, LIMIT, "--model", str(tiny_dir)), path) == EXPECTED


def test_the_gate_before_training_refuses_them(path, tiny_dir, capsys):
    recipe = target_recipe([str(path), LIMIT, "--model", str(tiny_dir), "--check_dataset_strategy", "error"])
    with pytest.raises(DataError, match=f"{len(REFUSALS)} faults in {len(REFUSALS) + 1} records"):
        check_before_training(recipe)
    assert "thin.png has 2 x 1333 pixels" in capsys.readouterr().out


def test_flare_validate_refuses_them(folder):
    cases = [case for case in REFUSALS if case.flare]
    file = folder / "retino_train.json"
    file.write_text(json.dumps([SOUND, *(case.record for case in cases)]))
    findings = validate_file(file, ImageCheck("decode", MediaPolicy(max_image_pixels=LARGEST)))
    found = {(error["record"], error["kind"]) for error in findings.errors}
    assert found >= {(f"{file}[{index}]", case.flare) for index, case in enumerate(cases, 1)}
    assert not any(record == f"{file}[0]" for record, _ in found)


def test_flare_convert_leaves_them_out_by_reason(tmp_path):
    tree = Tree(tmp_path / "organized_dataset")
    cases = [case for case in REFUSALS if case.convert]
    questions = [
        {
            "TaskType": "classification",
            "ImageName": f"imagesTr/{case.record['image'][0]}",
            "Question": case.record["conversations"][0]["value"],
            "Answer": case.record["conversations"][1]["value"],
        }
        for case in cases
    ]
    sound = {"TaskType": "classification", "ImageName": "imagesTr/a.png", "Question": "?", "Answer": "A"}
    tree.write("retino", []).write_text(json.dumps([sound, *questions]))
    (tree.folder("retino") / "imagesTr").mkdir()
    write_media(tree.folder("retino") / "imagesTr")
    words = ["--input_dir", str(tree.base), "--datasets", "retino", "--splits", "train"]
    assert convert([*words, "--max_image_pixels", str(LARGEST)]) == 0
    folder = tmp_path / "converted_data"
    skipped = json.loads((folder / "conversion_report.json").read_text())["statistics"]["skipped_by_reason"]
    expected = [case.convert for case in cases]
    assert skipped == {reason: expected.count(reason) for reason in expected}
    assert len(json.loads((folder / "retino_train.json").read_text())) == 1
    log = (folder / "conversion.log").read_text()
    assert "thin.png has 2 x 1333 pixels" in log
    assert "The limit is --max_image_pixels here." in log


def test_training_can_leave_out_what_its_plan_refuses(path, tiny_dir):
    """All but half an image, whose header is whole; that one is a placeholder when it is encoded."""
    words = ["--model", str(tiny_dir), LIMIT, "data.on_error=skip", "data.max_bad_fraction=1"]
    recipe = target_recipe([str(path), *words, "template.truncation_strategy=delete"])
    dataset, _ = build_datasets(recipe, build_processor(recipe), 42)
    assert dataset.at(0).measured.dropped() == {"no supervised token": 1, "that cannot be read": len(REFUSALS) - 2}
    assert ["fault" in dataset[index] for index in range(2)] == [False, True]


@pytest.mark.parametrize(
    ("name", "kind", "expected"),
    [
        (
            "thin.png",
            TooThin,
            "thin.png has 2 x 1333 pixels (width x height): one side is 666.5 times the other, and the processor takes "
            "at most 200 times. Crop or pad it, drop the record, or set data.on_error=skip",
        ),
        (
            "large.png",
            TooLarge,
            "large.png has 600 x 500 = 300000 pixels, above data.max_image_pixels=250000. Shrink the "
            "file, raise the limit, or set data.on_error=skip",
        ),
    ],
)
def test_the_message_names_width_and_height_and_what_to_do(name, kind, expected, folder, processor):
    encoder = Encoder(processor, policy=MediaPolicy(max_image_pixels=LARGEST))
    with pytest.raises(kind) as caught:
        encoder.length(image(name), str(folder))
    assert expected in str(caught.value)
    assert str(caught.value).startswith("record: image ")


@pytest.mark.parametrize(("side", "fits"), [(200, True), (201, False)])
def test_the_border_of_the_aspect_ratio_is_the_processors(side, fits, tmp_path, processor):
    """The limit that the messages state is the one of transformers' own processor."""
    from PIL import Image as Picture

    Picture.new("RGB", (10 * side, 10)).save(tmp_path / "x.png")
    report = checked(_write(tmp_path, image("x.png")))
    assert report.ok == fits
    official = reference_processor().image_processor
    if fits:
        official(images=[Picture.open(tmp_path / "x.png")])
    else:
        with pytest.raises(ValueError, match="aspect"):
            official(images=[Picture.open(tmp_path / "x.png")])


def _write(folder, *records):
    file = folder / "one.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def test_media_that_alone_exceed_the_length_are_found_without_a_model(folder, tmp_path):
    """A picture of 600 x 500 pixels is 19 x 16 tokens of 32 x 32 pixels."""
    record = image(str(folder / "large.png"))
    (fault,) = checked(_write(tmp_path, record), "template.max_length=300").faults
    assert (fault.reason, fault.message) == ("too_long", "its media alone have 304 tokens, template.max_length is 300")
    assert not checked(_write(tmp_path, record), "template.max_length=304").faults
    smaller = checked(_write(tmp_path, record), "template.max_length=300", "template.max_pixels=65536").faults
    assert not smaller, "the recipe's own pixel limit applies"


def test_training_stops_with_one_line_at_a_thin_image(folder, tiny_dir, tmp_path, capsys):
    path = _write(tmp_path, image(str(folder / "a.png")), image(str(folder / "thin.png")))
    words = [f"data.train={path}", f"model.model={tiny_dir}", f"training.output_dir={tmp_path / 'out'}"]
    assert main(["train", *words]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"error: {path}:2: image ")
    assert "2 x 1333 pixels (width x height)" in error


def test_a_plain_conversation_is_judged_without_rendering_as_with_it(folder, path, processor):
    """For every record of the cases, and for others that are sound."""
    encoder = Encoder(reference_processor(), policy=MediaPolicy(max_image_pixels=LARGEST))
    roles = [("user", "assistant"), ("system", "user", "assistant"), ("assistant",), ("user", "assistant", "user")]
    records = [SOUND, *(messages(*turns) for turns in roles), *(case.record for case in REFUSALS)]
    judged = {True: 0, False: 0}
    for record in records:
        try:
            conversation = read_record(record, Source("d", "d[0]"), str(folder))
            sizes = [image_size(part.value, encoder.policy)[::-1] for part in conversation.media(Image)]
            plan = plan_media(conversation, sizes, encoder)
        except DataError:
            continue
        if plan.faults or not is_plain(conversation, encoder):
            continue
        outcomes = [_outcome(require_plain_texts, conversation)]
        outcomes.append(_outcome(encoder.require_sound, conversation, plan.grids, plan.clips))
        assert outcomes[0] == outcomes[1]
        judged[outcomes[0] == ""] += 1
    assert min(judged.values()) >= 3, "vacuous"


def _outcome(ask, *arguments):
    try:
        ask(*arguments)
    except DataError as error:
        return f"{type(error).__name__}: {error}".partition(", near ")[0]  # the text around it differs
    return ""
