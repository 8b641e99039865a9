"""Nothing that a record says is dropped in silence: it changes the meaning and is an error, or it is counted."""

import json

import pytest
from cases import ListRecords, picture
from look_cases import asked, captioned, checked, sound
from run_cases import short_run

from qwenvl_ft import train
from qwenvl_ft.data.conversation import Source
from qwenvl_ft.data.encode.encoder import Encoder
from qwenvl_ft.data.plan import lengths as lengths_module
from qwenvl_ft.data.plan.dataset import SampleDataset
from qwenvl_ft.data.readers import READERS, read_record, register_reader
from qwenvl_ft.data.sources.key_rules import KeyRules
from qwenvl_ft.data.sources.mixture import load_mixture
from qwenvl_ft.data.sources.records import load_records
from qwenvl_ft.errors import DataError
from qwenvl_ft.export.quantize import calibration
from qwenvl_ft.flare.image_check import Looked
from qwenvl_ft.flare.validate import record_errors
from qwenvl_ft.look import check_report
from qwenvl_ft.recipe.load import load_recipe

TURNS = [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "A cat."}]
MESSAGES = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A cat."}]
FORMS = {
    "conversations": {"conversations": TURNS},
    "messages": {"messages": MESSAGES},
    "pairs": {"query": "What is it?", "response": "A cat."},
    "sharegpt": {"conversations": [{"from": "human", "value": "?"}, {"from": "bot", "value": "A cat."}]},
    "dense": captioned(),
}
CHANGING = {
    "audio": "a.wav",
    "audios": ["a.wav"],
    "audio_path": "a.wav",
    "speech": "a.wav",
    "chosen": "A cat.",
    "rejected": {"from": "gpt", "value": "A dog."},
    "rejected_response": "A dog.",
    "rejected_images": ["b.png"],
    "rejected_messages": MESSAGES,
    "non_preferred_output": MESSAGES,
    "negative_messages": [MESSAGES],
    "label": False,
    "kto_tag": False,
    "margin": 0.5,
    "score": 3,
    "weight": 0.5,
    "sample_weight": 0.5,
    "loss_weights": [0.5, 1],
    "loss_scale": 0.5,
    "loss": 1,
}
HARMLESS = {"source": "web", "task_type": 3, "label": "cat", "tags": ["a"], "verified": False, "weight": "3 kg"}


def read(record):
    return read_record(record, Source("d", "d.jsonl:7"))


@pytest.mark.parametrize("key", CHANGING)
@pytest.mark.parametrize("form", FORMS)
def test_a_key_that_changes_what_a_record_means_is_an_error_that_names_it(form, key):
    read(FORMS[form])
    with pytest.raises(DataError) as caught:
        read(FORMS[form] | {key: CHANGING[key]})
    text = str(caught.value)
    assert text.startswith(f"d.jsonl:7: {key}={CHANGING[key]!r:.60}"), text
    assert f"data.ignored_keys=[{key}]" in text
    assert "\n" not in text


@pytest.mark.parametrize("key", ["rejected", "audios"])
def test_such_a_key_without_a_value_is_none(key):
    for empty in (None, "", [], {}):
        assert read(FORMS["conversations"] | {key: empty}).unread == ()


def test_preference_records_without_turns_are_named_as_such():
    with pytest.raises(DataError, match=r"chosen='A cat.' is an answer that preference data prefer"):
        read({"prompt": "What is it?", "chosen": "A cat.", "rejected": "A dog."})


def test_a_rejected_answer_is_not_called_a_preferred_one():
    with pytest.raises(DataError, match=r"non_preferred_output=.* is an answer that preference data reject"):
        read({"messages": MESSAGES, "non_preferred_output": MESSAGES})


@pytest.mark.parametrize(
    ("turns", "key", "value"),
    [
        ("conversations", "sample_weight", 0.5),
        ("messages", "train", False),
        ("messages", "label", False),
        ("messages", "images", "a.png"),
    ],
)
def test_a_key_of_a_turn_that_changes_what_is_learned_is_an_error(turns, key, value):
    record = {turns: [FORMS[turns][turns][0], FORMS[turns][turns][1] | {key: value}]}
    with pytest.raises(DataError, match=rf"d.jsonl:7: {turns}\[1\]: {key}={value!r} is") as caught:
        read(record)
    assert "keep_true" not in str(caught.value), "that looks at whole records"


def test_a_medium_in_a_part_of_text_is_an_error_and_any_other_second_value_is_listed():
    with pytest.raises(DataError, match=r"messages\[0\].content\[0\]: image='a.png' is a medium .* type text"):
        read(
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "?", "image": "a.png"}]}, MESSAGES[1]]}
        )
    parts = [{"type": "text", "text": "?", "reasoning": "So."}, {"type": "image", "image": "a.png", "text": "A cat."}]
    found = dict(read({"messages": [{"role": "user", "content": parts}, MESSAGES[1]]}).unread)
    assert found == {"messages[].content[].reasoning": "'So.'", "messages[].content[].text": "'A cat.'"}


def test_keys_of_a_pair_in_a_list_are_judged_as_those_of_its_answer():
    pair = {"user": "What is it?", "assistant": "A cat."}
    read_pair = read({"texts": [pair | {"source": "web", "loss_weight": 0.5}], "history": [["?", "!"]]})
    assert dict(read_pair.unread) == {"messages[].source": "'web'", "history": "[['?', '!']]"}
    assert read_pair.messages[1].weight == 0.5
    with pytest.raises(DataError, match=r"rejected=.A dog.. is an answer that preference data reject"):
        read({"texts": [pair | {"rejected": "A dog."}]})


def test_turns_under_both_keys_are_an_error_where_one_list_would_be_dropped():
    with pytest.raises(DataError, match="both 'conversations' and 'messages' are given"):
        read(FORMS["sharegpt"] | {"messages": MESSAGES})


def test_any_other_key_that_holds_something_is_listed_with_its_value():
    for form in FORMS.values():
        found = dict(read(form | HARMLESS | {"empty": "", "nothing": None}).unread)
        assert found == {key: repr(value) for key, value in HARMLESS.items()}


def test_keys_of_turns_parts_and_objects_are_listed_by_their_place_once():
    part = {"type": "text", "text": "What?", "cache_control": {"type": "ephemeral"}}
    message = {"role": "user", "content": [part, part], "name": "Ann"}
    assert dict(read({"messages": [message, MESSAGES[1]]}).unread) == {
        "messages[].name": "'Ann'",
        "messages[].content[].cache_control": "{'type': 'ephemeral'}",
    }
    box = captioned()["objects"][0] | {"confidence": 0.5}
    assert dict(read(captioned(objects=[box, box])).unread) == {"objects[].confidence": "0.5"}


def test_valid_records_of_every_format_have_nothing_unread(picture_folder):
    records = [*sound(), *FORMS.values(), {"id": 1, "label": True, "messages": MESSAGES}]
    assert [read_record(record, Source("d", "d"), str(picture_folder)).unread for record in records] == [()] * len(
        records
    )


@pytest.fixture
def picture_folder(tmp_path):
    picture(96, 64).save(tmp_path / "a.png")
    picture(64, 64).save(tmp_path / "b.png")
    return tmp_path


@pytest.mark.parametrize(
    "key", ["img", "image_path", "image_name", "image_list", "picture", "image_urls", "video_path", "frames"]
)
def test_a_picture_under_another_name_is_an_error_where_the_model_would_see_none(key):
    with pytest.raises(DataError, match=rf"{key}='a.png' is no name of a medium here"):
        read({"messages": MESSAGES, key: "a.png"})
    seen = read({"messages": [{"role": "user", "content": "<image>?"}, MESSAGES[1]], "image": "a.png", key: "a.png"})
    assert dict(seen.unread) == {key: "'a.png'"}


@pytest.mark.parametrize("role", ["user", "assistant"])
@pytest.mark.parametrize("text", ["<audio>What do you hear?", "Listen: <audio>"])
def test_a_place_for_sound_in_a_text_is_an_error(role, text):
    turns = [{"role": role, "content": text}, MESSAGES[1]]
    with pytest.raises(DataError, match=r"<audio>|media tag"):
        read({"messages": turns})
    with pytest.raises(DataError, match=r"<audio>|media tag"):
        read({"conversations": [{"from": {"user": "human"}.get(role, "gpt"), "value": text}]})


def test_a_reader_of_ones_own_reads_what_it_likes():
    before = dict(READERS)
    try:
        register_reader(
            "judged", None, lambda record, *_: {"messages": record["chosen"]} if "judged" in record else None
        )
        assert read({"judged": 1, "chosen": MESSAGES, "rejected": MESSAGES}).unread == ()
    finally:
        READERS.clear()
        READERS.update(before)


def test_ignored_keys_are_taken_as_absent_in_records_turns_and_parts(write_jsonl):
    part = {"type": "text", "text": "What?", "score": 1}
    turns = [{"role": "user", "content": [part]}, MESSAGES[1] | {"score": 2}]
    path = write_jsonl([{"messages": turns, "score": 3, "tools": [{"type": "function", "function": {"score": 1}}]}])
    (kept, _, _), (cut, _, _) = (
        load_records(str(path), rules=rules)[0] for rules in (KeyRules(), KeyRules(ignored=("score",)))
    )
    assert kept["score"] == 3
    assert json.dumps(cut).count("score") == 1, "a schema is no part of a record's meaning"
    assert cut["tools"] == kept["tools"]
    assert load_records(str(path)).fingerprint != load_records(str(path), rules=KeyRules(("score",))).fingerprint


@pytest.mark.parametrize(("right", "wrong"), [(True, False), (1, 0)])
@pytest.mark.parametrize("key", ["label", "kto_tag"])
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".csv"])
def test_records_whose_label_is_false_are_left_out_and_counted(tmp_path, suffix, key, right, wrong):
    labels = [right, wrong, None, right, wrong, wrong]
    rows = [{"id": str(k), "query": "What?", "response": f"It is {k}.", key: v} for k, v in enumerate(labels)]
    path = tmp_path / f"data{suffix}"
    if suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), path)
    elif suffix == ".csv":
        path.write_text(f"id,query,response,{key}\n" + "".join(f"{','.join(map(str, r.values()))}\n" for r in rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    kept = [str(k) for k, label in enumerate(labels) if label is not wrong]
    train_set, _ = load_mixture(load_recipe(None, [f"data.train={path}", "data.label=keep_true"]).data, 0)
    assert [train_set[k][0]["id"] for k in range(len(train_set))] == kept
    assert train_set.left_out() == 3
    assert train_set.sampled(1).left_out() == 3
    everything, _ = load_mixture(load_recipe(None, [f"data.train={path}"]).data, 0)
    assert len(everything) == 6
    assert everything.left_out() == 0
    with pytest.raises(DataError, match=rf"{key}=.* is the mark of a wrong answer.*data.label=keep_true"):
        read_record(*everything[1])


def test_a_rate_is_a_share_of_the_records_that_are_kept(write_jsonl):
    path = write_jsonl([{"id": k, "messages": MESSAGES, "label": k % 3 > 0} for k in range(30)])
    chosen = load_records(f"{path}%50", rules=KeyRules(label="keep_true"))
    assert len(chosen) == 10
    assert all(chosen[k][0]["label"] for k in range(10))
    assert len(load_records(f"{path}#20", rules=KeyRules(label="keep_true"))) == 20


def test_a_file_of_wrong_answers_alone_is_an_error(write_jsonl):
    path = write_jsonl([{"messages": MESSAGES, "label": False}])
    with pytest.raises(DataError, match="every record has a false label"):
        load_records(str(path), rules=KeyRules(label="keep_true"))


@pytest.fixture
def tagged(write_jsonl):
    """Six records, four of them with a source and one with a tag in a turn; one label is false."""
    records = [{"id": f"r{k}", "messages": MESSAGES} | ({"source": f"s{k}"} if k > 1 else {}) for k in range(6)]
    records[5]["messages"] = [MESSAGES[0] | {"tag": 7}, MESSAGES[1]]
    return write_jsonl([*records, {"messages": MESSAGES, "label": False}])


def test_check_shows_each_unread_key_once_with_count_and_example(tagged):
    report = checked(tagged, "data.label=keep_true")
    text = check_report.text(report)
    (line,) = [line for line in text.splitlines() if "'source'" in line]
    assert line.strip() == f"nothing reads the key 'source' (4 records), e.g. {tagged}:3 (id 'r2'): 's2'"
    assert f"'messages[].tag' (1 record), e.g. {tagged}:6 (id 'r5'): 7" in text
    assert "left out for their false label (data.label=keep_true): 1" in text
    split = report.to_json()["splits"]["train"]
    assert split["unread_keys"]["source"]["records"] == 4
    assert split["left_out_by_label"] == 1


def test_check_reports_a_key_that_changes_the_meaning_at_its_record(write_jsonl):
    path = write_jsonl([{"messages": MESSAGES}, {"messages": MESSAGES, "audios": ["a.wav"]}])
    faults = [fault for fault in checked(path).errors() if "audios" in fault.message]
    assert [(fault.reason, fault.where) for fault in faults] == [("structure", f"{path}:2")]
    assert not [fault for fault in checked(path, "data.ignored_keys=[audios]").errors() if "audios" in fault.message]


def test_a_damaged_file_follows_the_same_rules(write_jsonl):
    path = write_jsonl([asked([], label=True), asked([], "No", label=False, score=1)])
    path.write_text(path.read_text().replace("<image>\\n", "") + "[1,\n")
    report = checked(path, "data.label=keep_true", "data.ignored_keys=[score]")
    assert [fault.reason for fault in report.faults if fault.reason != "duplicate"] == ["json"]
    assert report.splits["train"].records == 2, "the one that is kept, and the damaged line"
    assert report.splits["train"].left_out == 1


def test_a_run_says_at_its_start_what_nothing_reads_and_says_so_again_from_the_cache(
    tiny_dir, tagged, tmp_path, capfd, monkeypatch
):
    for number in range(2):
        words = short_run(tiny_dir, str(tagged), tmp_path / f"run{number}", "data.label=keep_true")
        train(load_recipe(None, words))
        text = capfd.readouterr().out
        assert text.count("nothing reads the key 'source' (4 records)") == 1
        assert text.count("nothing reads the key 'messages[].tag' (1 record)") == 1
        assert "1 with label false" in text
        monkeypatch.setattr(lengths_module, "_measure", None)  # the second run reads the cache


def test_unread_keys_of_dense_captions_in_groups_are_counted_by_record(processor, tmp_path, picture_folder):
    image = str(picture_folder / "a.png")
    records = ListRecords([captioned(images=[image], source=k) for k in range(3)])
    from qwenvl_ft.data.plan.epochs import open_epochs

    dataset = SampleDataset(open_epochs(records), Encoder(processor), cache_dir=tmp_path)
    assert len(dataset) == 2
    (line,) = dataset.remarks()
    assert "'source' (3 records)" in line


def test_flare_validation_and_calibration_ask_the_same_question(tmp_path, write_jsonl, picture_folder):
    record = asked("a.png", label=False)
    assert [kind for kind, _ in record_errors(record, picture_folder, Sound())] == ["meaning"]
    assert not list(record_errors(asked("a.png"), picture_folder, Sound()))
    path = write_jsonl([asked("a.png", score=1), asked("b.png", "A dog.", label=False)])
    with pytest.raises(DataError, match="score=1 is a judgement"):
        calibration(str(path), 2, 0)
    assert len(calibration(str(path), 2, 0, ["score"])) == 1, "the wrong answer is left out"


class Sound:
    """An image check that finds nothing."""

    def fault(self, path):
        return Looked()
