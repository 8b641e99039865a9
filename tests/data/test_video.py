"""Video files: frames, times and tokens compared with transformers."""

import re

import av
import numpy as np
import pytest
import torch
from cases import SHARED, ListRecords, picture
from transformers.video_utils import VideoMetadata, load_video
from video_cases import SOURCE, asked, film

from qwenvl_ft.data.conversation import Limits, Sampling, Video
from qwenvl_ft.data.encode.draft import TooLong, Unsupervised
from qwenvl_ft.data.encode.encoder import Encoder
from qwenvl_ft.data.media import video as video_module
from qwenvl_ft.data.media.images import MediaPolicy
from qwenvl_ft.data.media.video import clip_pixels, plan_clip, sample_frames
from qwenvl_ft.data.plan.lengths import measure
from qwenvl_ft.errors import DataError, RecipeError
from qwenvl_ft.model.load import load_processor
from qwenvl_ft.upstream.processors import CAP


def loaded(processor, path):
    """Return the frames [F, 3, H, W] and the metadata, as transformers reads and samples them."""
    sample = processor.video_processor.sample_frames
    frames, metadata = load_video(path, backend="pyav", sample_indices_fn=lambda metadata, **_: sample(metadata))
    return torch.from_numpy(frames).permute(0, 3, 1, 2), metadata


def capped(video_processor):
    """Return the cap per frame as an option, if this transformers has one: it warns if the option is not given."""
    name = "cap_pixels_per_frame"
    return {name: bool(getattr(video_processor, name))} if hasattr(video_processor, name) else {}


def official(processor, path, question):
    """Return transformers' token ids, without the outer vision start and end (as in released models), and output."""
    video, metadata = loaded(processor, path)
    messages = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": question}]}]
    out = processor(
        text=[processor.apply_chat_template(messages, tokenize=False)],
        videos=[video],
        video_metadata=[metadata],
        do_sample_frames=False,
        return_tensors="pt",
        **capped(processor.video_processor),
    )
    ids = out["input_ids"][0].tolist()
    first = ids.index(processor.vision_start_token_id)
    last = len(ids) - 1 - ids[::-1].index(processor.vision_end_token_id)
    if ids[first + 1] == processor.video_token_id:  # transformers 5.9 and older write no outer pair
        return ids, out
    return ids[:first] + ids[first + 1 : last] + ids[last + 1 :], out


@pytest.mark.parametrize("name", ["plain", "odd", "slow", "ntsc", "avi"])
@pytest.mark.parametrize("settings", [{}, {"fps": 4.5, "max_frames": 9}, {"fps": 0.1, "min_frames": 5}])
def test_video_files_give_the_same_tokens_and_pixels_as_transformers(tiny_dir, films, name, settings):
    processor = load_processor(str(tiny_dir), **settings)
    encoder = Encoder(processor)
    ids, out = official(processor, films[name], "What moves?")
    record = asked(films[name])
    sample = encoder(record)
    assert sample["input_ids"][: len(ids)].tolist() == ids
    assert sample["video_grid_thw"].tolist() == out["video_grid_thw"].tolist()
    assert torch.equal(sample["pixel_values_videos"], out["pixel_values_videos"])
    assert encoder.length(record) == len(sample["input_ids"])


def test_the_released_processor_agrees(films):
    """The real tokenizer, area limits and frame limits."""
    if not (SHARED / "qwen3vl_processor").exists():
        pytest.skip("the released processor is not here")
    processor = load_processor(str(SHARED / "qwen3vl_processor"))
    for name in ("plain", "ntsc"):
        ids, out = official(processor, films[name], "What moves?")
        sample = Encoder(processor)(asked(films[name]))
        assert sample["input_ids"][: len(ids)].tolist() == ids
        assert torch.equal(sample["pixel_values_videos"], out["pixel_values_videos"])


def test_positions_are_those_of_the_model(tiny_model, processor, films):
    sample = Encoder(processor)(asked(films["odd"], films["plain"], images=[picture(64, 96)]))
    kinds = torch.zeros_like(sample["input_ids"])
    kinds[sample["input_ids"] == processor.image_token_id] = 1
    kinds[sample["input_ids"] == processor.video_token_id] = 2
    positions, _ = tiny_model.model.get_rope_index(
        sample["input_ids"][None],
        kinds[None].int(),
        image_grid_thw=sample["image_grid_thw"],
        video_grid_thw=sample["video_grid_thw"],
    )
    assert torch.equal(sample["position_ids"], positions[:, 0])
    assert len(sample["video_grid_thw"]) == 2


def test_frames_are_chosen_as_transformers_chooses_them(processor):
    part, rng = processor.video_processor, np.random.default_rng(0)
    for _ in range(500):
        total, rate, fps = int(rng.integers(2, 5000)), float(rng.uniform(0.5, 120)), float(rng.uniform(0.1, 8))
        expected = part.sample_frames(VideoMetadata(total_num_frames=total, fps=rate), fps=fps)
        assert sample_frames(total, rate, fps, part.min_frames, part.max_frames).tolist() == expected.tolist()


@pytest.mark.parametrize("name", ["mkv", "webm"])
def test_containers_that_do_not_count_their_frames_are_counted(processor, films, name):
    with av.open(films[name]) as container:
        assert container.streams.video[0].frames == 0, "vacuous"
        total = sum(1 for _ in container.decode(video=0))
    clip = plan_clip(Video(films[name]), processor.video_processor, MediaPolicy(), SOURCE)
    assert clip.indices[-1] == total - 1
    assert len(clip_pixels(Video(films[name]), clip, processor.video_processor, MediaPolicy(), SOURCE)) == len(
        clip.indices
    )


def test_hidden_frames_are_not_counted(processor, films, tmp_path):
    """A clip cut without re-encoding has extra frames at its beginning, which an edit list hides."""
    path = str(tmp_path / "cut.mp4")
    with av.open(films["plain"]) as source, av.open(path, "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                shift = int(5 / 10 / packet.time_base)
                packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, stream
                target.mux(packet)
    with av.open(path) as container:
        shown = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert len(shown) < container.streams.video[0].frames, "vacuous: nothing is hidden"
    part = processor.video_processor
    video = Video(path, sampling=Sampling(num_frames=len(shown)))
    clip = plan_clip(video, part, MediaPolicy(), SOURCE)
    assert clip.indices == tuple(range(len(shown)))
    assert len(clip_pixels(video, clip, part, MediaPolicy(), SOURCE)) == len(shown)


@pytest.mark.parametrize("angle", [90, 180, 270])
def test_a_rotated_video_is_decoded_upright(processor, tmp_path, angle):
    """The white corner is where a player shows it: a positive angle rotates counter-clockwise."""
    if not hasattr(av.VideoStream, "set_display_rotation"):
        pytest.skip("this PyAV writes no turned films")
    path = film(str(tmp_path / "turned.mp4"), size=(128, 64), turned=angle)
    part = processor.video_processor
    clip = plan_clip(Video(path), part, MediaPolicy(), SOURCE)
    frame = clip_pixels(Video(path), clip, part, MediaPolicy(), SOURCE)[0].float().mean(dim=0)
    high, wide = frame.shape
    assert (high > wide) == (angle != 180)
    corners = {90: (-1, 0), 180: (-1, -1), 270: (0, -1)}
    brightest = max(((y, x) for y in (0, -1) for x in (0, -1)), key=lambda at: float(frame[at]))
    assert brightest == corners[angle]


def test_a_length_decodes_at_most_the_first_frame(processor, films, monkeypatch):
    encoder = Encoder(processor)
    expected = len(encoder(asked(films["plain"], films["mkv"]))["input_ids"])
    monkeypatch.setattr(video_module, "_decoded", lambda *_: pytest.fail("frames were decoded"))
    assert encoder.length(asked(films["plain"], films["mkv"])) == expected
    with pytest.raises(pytest.fail.Exception):
        encoder(asked(films["plain"]))


def test_each_video_can_set_its_own_limits_and_frame_sampling(processor, films):
    part = processor.video_processor

    def shown(*arguments, **options):
        return plan_clip(
            Video(films["odd"], *arguments, **options), part, MediaPolicy(), SOURCE
        )  # 55 frames, 11 a second

    assert len(shown(1.0).indices) == 5
    assert shown(1.0).times(2) == pytest.approx([(0 + 14) / 2 / 11, (27 + 40) / 2 / 11, 54 / 11])
    assert shown(sampling=Sampling(num_frames=6)).indices == (0, 11, 22, 32, 43, 54)
    assert shown(sampling=Sampling(min_frames=20)).indices[-1] == 54
    assert len(shown(sampling=Sampling(min_frames=20)).indices) == 20
    assert len(shown(sampling=Sampling(max_frames=4)).indices) == 4
    middle = shown(11.0, sampling=Sampling(start=1.0, end=2.0))
    assert middle.indices == tuple(range(11, 23))
    assert middle.times(2)[0] == pytest.approx((11 + 12) / 2 / 11)
    area = lambda clip: clip.grid[1] * clip.grid[2] * part.patch_size**2  # noqa: E731
    whole = shown()
    small = shown(limits=Limits(max_pixels=4096))
    assert area(small) <= 4096 < area(whole)
    assert area(shown(limits=Limits(total_pixels=2048 * len(whole.indices)))) <= 2048
    assert area(shown(limits=Limits(min_pixels=40_000))) >= 40_000
    assert shown(limits=Limits(resized_height=96, resized_width=64)).grid[1:] == (6, 4)
    for options in (Limits(max_pixels=4096), Limits(resized_height=96, resized_width=64)):
        video = Video(films["odd"], limits=options)
        clip = plan_clip(video, part, MediaPolicy(), SOURCE)
        pixels = clip_pixels(video, clip, part, MediaPolicy(), SOURCE)
        assert tuple(pixels.shape[2:]) == (clip.grid[1] * part.patch_size, clip.grid[2] * part.patch_size)


def test_a_cap_per_frame_is_the_processors_own(tiny_dir, films):
    if CAP.missing():
        with pytest.raises(RecipeError, match=r"template.video_frame_max_pixels: .* does not work with transformers"):
            load_processor(str(tiny_dir), video_frame_max_pixels=4096)
        return
    processor = load_processor(str(tiny_dir), video_frame_max_pixels=4096)
    ids, out = official(processor, films["odd"], "What moves?")
    sample = Encoder(processor)(asked(films["odd"]))
    assert sample["input_ids"][: len(ids)].tolist() == ids
    assert sample["video_grid_thw"].tolist() == out["video_grid_thw"].tolist()
    assert int(sample["video_grid_thw"][0, 1:].prod()) * 16 * 16 <= 4096


def test_a_processor_of_an_older_family_is_refused_for_videos(processor, films):
    """Qwen2.5-VL writes no times between frames, so its processor is refused and not treated like Qwen3-VL's."""

    class Older:
        def __getattr__(self, name):
            return getattr(processor, name)

    with pytest.raises(DataError, match=r"videos need a Qwen3-VL processor, not Older"):
        Encoder(Older())(asked(films["plain"]))
    assert len(Encoder(Older())(asked(images=[picture(64, 96)]))["input_ids"]) > 0


def test_bytes_give_the_same_pixels_as_a_file(processor, films):
    with open(films["plain"], "rb") as file:  # noqa: PTH123
        sample = Encoder(processor)(asked(file.read()))
    assert torch.equal(sample["pixel_values_videos"], Encoder(processor)(asked(films["plain"]))["pixel_values_videos"])


def test_a_changed_video_is_measured_again(processor, tmp_path):
    path = film(str(tmp_path / "a.mp4"))
    records = ListRecords([asked(path)])
    first = measure(records, Encoder(processor), cache_dir=tmp_path).tokens[0]
    film(path, frames=80)
    second = measure(records, Encoder(processor), cache_dir=tmp_path).tokens[0]
    assert second == Encoder(processor).length(records[0][0]) > first


def test_videos_and_images_of_one_sample_are_the_same_as_in_transformers(processor, films):
    """Two files, a list of frames and two images, numbered by the template; outer vision start and end are removed."""
    frames = [picture(64, 64, seed) for seed in range(4)]
    images = [picture(96, 64), picture(64, 128, 1)]
    text = "A <image> then <video> then <video> and <image> or <video> ?"
    record = {
        "video": [films["plain"], frames, films["ntsc"]],
        "image": images,
        "fps": 2,
        "conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": "It."}],
    }
    part = processor.video_processor
    clips = [loaded(processor, films[name]) for name in ("plain", "ntsc")]
    listed = torch.from_numpy(np.stack([np.array(frame) for frame in frames])).permute(0, 3, 1, 2)
    kinds = {"<image>": {"type": "image"}, "<video>": {"type": "video"}}
    content = [kinds.get(word, {"type": "text", "text": word}) for word in text.split()]
    out = processor(
        text=[
            processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False, add_vision_id=True)
        ],
        images=images,
        videos=[clips[0][0], listed, clips[1][0]],
        video_metadata=[
            clips[0][1],
            VideoMetadata(total_num_frames=4, fps=2.0, frames_indices=[0, 1, 2, 3]),
            clips[1][1],
        ],
        do_sample_frames=False,
        return_tensors="pt",
        **capped(part),
    )
    decoded = processor.tokenizer.decode(out["input_ids"][0].tolist())
    frame = r"<[\d.]+ seconds><\|vision_start\|>(?:<\|video_pad\|>)+<\|vision_end\|>"
    outer = rf"<\|vision_start\|>((?:{frame})+)<\|vision_end\|>"
    expected, count = re.subn(outer, r"\1", decoded)
    assert count in (0, 3), "transformers 5.9 and older write no outer pair"
    sample = Encoder(processor, add_vision_id=True)(record)
    assert processor.tokenizer.decode(sample["input_ids"].tolist()).startswith(expected)
    assert "Video 3: <0." in expected
    for key in ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw"):
        assert torch.equal(sample[key], out[key].to(sample[key].dtype)), key


@pytest.mark.parametrize("strategy", ["left", "right", "delete", "raise"])
def test_truncation_never_cuts_a_video_or_a_time(processor, films, strategy):
    """At every length limit, a sample keeps original tokens and whole media with their pixels, or raises an error."""
    record = {
        "video": [films["slow"], films["plain"]],
        "image": [picture(64, 64)],
        "conversations": [
            {"from": "human", "value": "one <video> two <image>"},
            {"from": "gpt", "value": "first"},
            {"from": "human", "value": "three <video> four"},
            {"from": "gpt", "value": "second"},
        ],
    }
    whole = Encoder(processor)(record)
    ids = whole["input_ids"].tolist()
    merge = processor.image_processor.merge_size**2
    seen = set()
    for limit in range(1, len(ids) + 1):
        try:
            sample = Encoder(processor, max_length=limit, truncation_strategy=strategy)(record)
        except Unsupervised:
            seen.add("unsupervised")
            continue
        except TooLong:
            assert strategy in ("delete", "raise")
            assert limit < len(ids)
            seen.add("too long")
            continue
        cut = sample["input_ids"].tolist()
        assert len(cut) <= limit
        assert cut == (ids[: len(cut)] if strategy == "right" else ids[len(ids) - len(cut) :])
        for kind, pad in (("image", processor.image_token_id), ("video", processor.video_token_id)):
            grids = sample.get(f"{kind}_grid_thw", torch.zeros(0, 3, dtype=torch.long))
            pixels = sample.get("pixel_values" if kind == "image" else "pixel_values_videos", torch.zeros(0, 1))
            assert cut.count(pad) * merge == int(grids.prod(dim=1).sum()) == len(pixels)
            seen.add((kind, len(grids)))
        if "video_grid_thw" in sample:
            kept, every = sample["pixel_values_videos"], whole["pixel_values_videos"]
            assert torch.equal(kept, every[: len(kept)] if strategy == "right" else every[len(every) - len(kept) :])
            text = processor.tokenizer.decode(cut)
            assert text.count(" seconds>") == int(sample["video_grid_thw"][:, 0].sum())
    wanted = {"left": {("video", 1), ("video", 2), ("image", 0)}, "right": {("video", 1), ("video", 2), ("image", 1)}}
    assert seen >= wanted.get(strategy, {"too long", ("video", 2)})


def test_areas_below_one_patch_do_not_crash(tiny_dir, films):
    processor = load_processor(str(tiny_dir), video_min_pixels=1, video_max_pixels=1)
    sample = Encoder(processor)(asked(films["plain"]))
    assert sample["video_grid_thw"][:, 1:].tolist() == [[2, 2]]
    assert Encoder(processor).length(asked(films["plain"])) == len(sample["input_ids"])
