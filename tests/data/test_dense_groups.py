"""Groups and modes: every record once per epoch, independent of workers and order of access."""

import json
import pickle

import pytest
from cases import ListRecords, picture
from torch.utils.data import DataLoader, Dataset

from qwenvl_ft.data.augment.pipeline import Augmenter
from qwenvl_ft.data.conversation import Image
from qwenvl_ft.data.dense.compose import dense_messages
from qwenvl_ft.data.dense.groups import DenseGroups, draw_mode, epoch_groups
from qwenvl_ft.data.dense.options import DenseOptions
from qwenvl_ft.data.sources.records import load_records
from qwenvl_ft.errors import DataError

AUGMENTER = Augmenter.from_config({"ops": [{"rotate": {"max_deg": 8, "prob": 0.5}}, {"scale": {"prob": 0.5}}]})


def record(number, **change):
    return {
        "images": [f"/data/{number}.jpg"],
        "width": 1000,
        "height": 500,
        "objects": [{"desc": f"thing{number}/new", "bbox_2d": [400, 200, 600, 300]}],
        "summary": f"thing{number}×1",  # noqa: RUF001
    } | change


def groups_of(count=9, *, training=True, augmenter=None, **options):
    return DenseGroups(
        ListRecords([record(k) for k in range(count)]), DenseOptions(**options), training=training, augmenter=augmenter
    )


def content_of(conversation):
    """Return the texts of a conversation, its images with their augmentations, and its source."""
    texts = [part for message in conversation.messages for part in message.content if not isinstance(part, Image)]
    return texts, [(image.value.value, image.value.drawn) for image in conversation.media(Image)], conversation.source


class ContentDataset(Dataset):
    """The content of an epoch's conversations, for dataloader workers."""

    def __init__(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return len(self.epoch)

    def __getitem__(self, index):
        return content_of(self.epoch[index])


def test_groups_are_consecutive_chunks_of_the_epochs_permutation():
    assert epoch_groups(5, 2, shuffle=False) == [[0, 1], [2, 3], [4]]
    assert epoch_groups(4, 4, shuffle=False) == [[0, 1, 2, 3]]
    for size in (1, 2, 3):
        first, second = (epoch_groups(20, size, seed=3, epoch=epoch) for epoch in (0, 1))
        assert sorted(k for group in first for k in group) == list(range(20))
        assert [len(group) for group in first] == [size] * (20 // size) + [20 % size] * (20 % size > 0)
        assert first != second, "an epoch repeats the one before"
        assert first == epoch_groups(20, size, seed=3, epoch=0)
    assert epoch_groups(20, 2, seed=4) != epoch_groups(20, 2, seed=3)
    flat = [k for group in epoch_groups(20, 3, seed=3) for k in group]
    assert flat == [k for group in epoch_groups(20, 1, seed=3) for k in group], "the order depends on the group size"


def test_a_group_of_one_is_one_record():
    groups = groups_of(3, images_per_user_turn=1)
    for k in range(3):
        conversation = groups.conversations(0)[k]
        assert len(conversation.media(Image)) == 1
        assert list(json.loads(dense_messages(conversation)["messages"][1]["content"][0]["text"])) == ["图片_1"]


def test_an_epoch_shows_every_record_once_with_its_own_image():
    epoch = groups_of(9).conversations(2)
    assert len(epoch) == 5
    shown = []
    for conversation in epoch:
        answer = json.loads(dense_messages(conversation)["messages"][1]["content"][0]["text"])
        images = [image.value.value for image in conversation.media(Image)]
        names = [entry["object_1"]["desc"].split("/")[0] for entry in answer.values()]
        assert [f"/data/{name.removeprefix('thing')}.jpg" for name in names] == images
        shown += images
    assert sorted(shown) == [f"/data/{k}.jpg" for k in range(9)]
    assert [content_of(c) for c in epoch[1:3]] == [content_of(epoch[1]), content_of(epoch[2])]
    assert content_of(epoch[-1]) == content_of(epoch[4])
    with pytest.raises(IndexError):
        epoch[5]


def test_everything_is_a_function_of_seed_epoch_and_group():
    """Workers, pickling, the order of access and earlier accesses change nothing."""
    make = lambda **more: groups_of(30, augmenter=AUGMENTER, summary_ratio=0.5, seed=7, **more)  # noqa: E731
    epoch = make().conversations(3)
    expected = [content_of(conversation) for conversation in epoch]
    other = make()
    asked = {}
    for k in reversed(range(len(epoch))):
        other.conversation(k % 2, k)
        asked[k] = content_of(other.conversation(3, k))
    assert [asked[k] for k in range(len(epoch))] == expected
    copy = pickle.loads(pickle.dumps(epoch))
    assert [content_of(conversation) for conversation in copy] == expected
    for workers in (1, 2):
        loader = DataLoader(ContentDataset(epoch), batch_size=2, num_workers=workers, collate_fn=list)
        assert [row for batch in loader for row in batch] == expected
    assert expected != [content_of(conversation) for conversation in make().conversations(4)]
    drawn = [change for _, images, _ in expected for _, change in images]
    assert sum(bool(change.steps) for change in drawn) > 10, "vacuous: nothing is augmented"
    assert len({change.steps for change in drawn if change.steps}) > 10, "vacuous: one augmentation for all"


def test_modes_alternate_by_group_with_the_asked_share():
    for ratio, low, high in ((0.25, 0.22, 0.28), (0.5, 0.47, 0.53)):
        options = DenseOptions(summary_ratio=ratio)
        modes = [draw_mode(options, 0, group) for group in range(4000)]
        assert low < modes.count("summary") / len(modes) < high
        assert modes == [draw_mode(options, 0, group) for group in range(4000)]
        assert modes != [draw_mode(options, 1, group) for group in range(4000)]
    for ratio, mode in ((None, "dense"), (0, "dense"), (1, "summary")):
        assert {draw_mode(DenseOptions(summary_ratio=ratio), 0, group) for group in range(200)} == {mode}


def test_a_whole_group_shares_prompts_and_the_shape_of_its_answer():
    groups = groups_of(40, summary_ratio=0.5, images_per_user_turn=4)
    seen = set()
    for k, conversation in enumerate(groups.conversations(0)):
        mode = groups.mode(0, k)
        seen.add(mode)
        prompt = groups.options.prompts[mode]
        assert conversation.messages[0].content[0].text == prompt.system
        assert conversation.messages[1].content[-1].text == prompt.user
        answer = json.loads(conversation.messages[2].content[0].text)
        assert {type(value) for value in answer.values()} == {str if mode == "summary" else dict}
    assert seen == {"dense", "summary"}, "vacuous: one mode only"


def test_validation_is_the_same_in_every_epoch_in_file_order_and_never_augmented():
    groups = groups_of(7, training=False, augmenter=AUGMENTER, summary_ratio=0.5)
    first = [content_of(conversation) for conversation in groups.conversations(0)]
    assert first == [content_of(conversation) for conversation in groups.conversations(5)]
    assert [image for _, images, _ in first for image in images] == [(f"/data/{k}.jpg", None) for k in range(7)]
    assert groups.fingerprint(0) == groups.fingerprint(5)


def test_summaries_are_required_of_every_record_before_training_and_only_if_drawn():
    records = [record(k) for k in range(4)]
    records[1]["summary"] = ""
    del records[3]["summary"]
    with pytest.raises(DataError, match=r"2 of 4 records have no valid 'summary'.*the first is list\[1\]: it is empty"):
        DenseGroups(ListRecords(records), DenseOptions(summary_ratio=0.1))
    for ratio in (None, 0.0):
        assert len(DenseGroups(ListRecords(records), DenseOptions(summary_ratio=ratio))) == 2


def test_a_malformed_record_is_named_when_its_group_is_made():
    records = [record(0), record(1, objects=[{"desc": "x", "bbox_2d": [9, 9, 1, 1]}])]
    groups = DenseGroups(ListRecords(records), DenseOptions())
    with pytest.raises(DataError, match=r"list\[1\]: objects\[0\]\.bbox_2d=.*x1=9 is not less than x2=1"):
        groups.conversation(0, 0)
    with pytest.raises(DataError, match="no dense-caption record"):
        DenseGroups(ListRecords([]), DenseOptions())


def test_the_fingerprint_changes_with_all_that_changes_conversations():
    groups = groups_of(6)
    keys = {groups.fingerprint(0), groups.fingerprint(1), groups.conversations(1).fingerprint}
    assert len(keys) == 2
    for change in ({"emit_norm": "none"}, {"seed": 1}, {"user": "Which?"}, {"images_per_user_turn": 1}):
        keys.add(DenseGroups(groups.records, DenseOptions(**change)).fingerprint(0))
    keys.add(DenseGroups(groups.records, DenseOptions(), augmenter=AUGMENTER).fingerprint(0))
    keys.add(DenseGroups(groups.records, DenseOptions(), training=False).fingerprint(0))
    assert len(keys) == 8
    assert DenseGroups(groups.records, DenseOptions()).fingerprint(0) == groups.fingerprint(0)


def test_groups_of_a_file_pickle_small_and_find_images_beside_it(tmp_path, write_jsonl, encoder):
    (tmp_path / "images").mkdir()
    for k in range(3):
        picture(96, 64, k).save(tmp_path / "images" / f"{k}.png")
    place = {"width": 96, "height": 64, "objects": [{"desc": "a", "bbox_2d": [10, 10, 50, 50]}]}
    records = [record(k, images=[f"images/{k % 3}.png"], **place) for k in range(5000)]
    groups = DenseGroups(load_records([str(write_jsonl(records))], cache_dir=tmp_path / "cache"), DenseOptions())
    conversation = groups.conversation(0, 17)
    assert conversation.source.record.count("data.jsonl:") == 2
    assert len(encoder(conversation)["input_ids"]) == encoder.length(conversation)
    assert len(pickle.dumps(groups.conversations(0))) < 3000, "a worker gets more than it needs"
