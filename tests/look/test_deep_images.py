"""check, stats and show report deep images and files of several frames."""

import json
import re

import numpy as np
import pytest
from cases import picture
from look_cases import asked, checked
from PIL import Image

from qwenvl_ft.cli.main import main
from qwenvl_ft.data.media.images import MediaPolicy
from qwenvl_ft.data.media.reading import Reading
from qwenvl_ft.look.check_report import text
from qwenvl_ft.look.histogram import depth_histogram
from qwenvl_ft.look.selection import target_recipe
from qwenvl_ft.look.show import show_recipe
from qwenvl_ft.look.stats import count_recipe

VALUES = np.arange(64 * 96, dtype=np.uint16).reshape(64, 96) % 4096


@pytest.fixture
def scans(data, tmp_path):
    """A file of three records: 16-bit with a window, 16-bit without, and an animated GIF."""
    Image.fromarray(VALUES).save(tmp_path / "deep.png")
    frames = [picture(96, 64, k) for k in range(3)]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    return data([asked("deep.png", window=[0, 4095]), asked("deep.png", "Other."), asked("moving.gif"), asked("a.png")])


def test_check_names_deep_images_without_a_setting_and_accepts_the_others(scans):
    report = checked(scans)
    assert report.counts()["high_bit_depth"] == 1
    [fault] = [fault for fault in report.faults if fault.reason == "high_bit_depth"]
    assert fault.where.endswith("data.jsonl:2")
    assert "mode I;16, found 0 to 4095" in fault.message
    accepted = checked(scans, "data.high_bit_depth=minmax")
    assert "high_bit_depth" not in accepted.counts()
    assert accepted.splits["train"].modes == {"I;16": 2, "P": 1, "RGB": 1}


def test_check_says_once_for_each_data_set_that_a_first_frame_is_shown(scans):
    printed = text(checked(scans, "data.high_bit_depth=minmax"))
    lines = [line for line in printed.splitlines() if "several frames" in line]
    assert len(lines) == 1
    assert re.search(
        r"1 image is a file of several frames .*frame 0 is shown, e.g. .*moving\.gif \(3 frames\)", lines[0]
    )
    assert "several frames" not in text(checked(scans, "data.high_bit_depth=minmax", "data.image_frame=0"))


def test_stats_lists_the_modes(scans):
    found = count_recipe(target_recipe([str(scans), "data.high_bit_depth=clip"]), quiet=True)
    assert found.counts["modes"] == {"I;16": 2, "P": 1, "RGB": 1}
    assert found.unread == 0


def test_a_histogram_counts_the_values_before_and_after(tmp_path):
    path = tmp_path / "deep.png"
    Image.fromarray(VALUES).save(path)
    found = depth_histogram(str(path), MediaPolicy(reading=Reading("window", (0.0, 100.0))))
    assert (found.low, found.high, sum(found.before), sum(found.after)) == (0, 4095, VALUES.size, 3 * VALUES.size)
    assert found.before == np.histogram(VALUES, 32, (0, 4095))[0].tolist()
    assert found.after[-1] >= 3 * int((VALUES >= 100).sum()), "most pixels saturate"
    assert max(found.bars("before")) == 1
    picture(9, 9).save(tmp_path / "plain.png")
    assert depth_histogram(str(tmp_path / "plain.png"), MediaPolicy()) is None


def test_show_draws_what_the_model_sees_and_the_histograms(scans, tiny_dir, tmp_path):
    recipe = target_recipe([str(scans), "data.high_bit_depth=minmax", f"model.model={tiny_dir}"])
    page = show_recipe(recipe, tmp_path / "show.html").read_text(encoding="utf-8")
    captions = re.findall(r'<figcaption class="histogram">(.*?)</figcaption>', page, flags=re.DOTALL)
    assert len(captions) == 2
    assert "I;16, converted by window 0 to 4095:" in captions[0]
    assert "I;16, converted by minmax:" in captions[1]
    assert all(caption.count("<rect") == 64 for caption in captions)
    assert "before: 0 to 4095" in captions[0]


def test_the_json_of_check_holds_modes_and_frames(scans, capsys):
    assert main(["check", str(scans), "--json", "data.high_bit_depth=clip"]) in (0, 1)
    split = json.loads(capsys.readouterr().out)["splits"]["train"]
    assert split["modes"]["I;16"] == 2
    assert list(split["several_frames"].values()) == [1]
