"""A GPU day records every step, whatever its outcome, keeps its budget, and is written into the documents."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


@pytest.fixture(autouse=True)
def on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE))


def python(code):
    return [sys.executable, "-c", code]


def step(name, code, limit=20.0, usual=0.1):
    from steps import Step, read_json

    return Step(name, python(code), limit, usual, read_json)


MACHINE = (
    'print(\'{"device": "NVIDIA Made Up", "memory_gib": 79.2, "python": "3.12.3", "versions": {"torch": "2.11.0"}}\')'
)


def run(steps, folder, budget=60.0, again=False):
    from day import read, run_day

    file = folder / "gpu.json"
    run_day(steps, read(file, False), file, dict(os.environ), budget, again)
    saved = json.loads(file.read_text())
    return saved, {entry["step"]: entry for entry in saved["steps"]}


def test_each_step_is_a_row_whatever_its_outcome(tmp_path):
    hangs = "import subprocess, time; subprocess.Popen(['sleep', '30']); print('began', flush=True); time.sleep(30)"
    steps = [
        step("machine", MACHINE),
        step("works", "print('noise'); print('{\"a\": 1}')"),
        step("fails", "raise SystemExit('no luck')"),
        step("memory", "raise MemoryError('torch.OutOfMemoryError: 80 GiB')"),
        step("hangs", hangs, limit=2.0),
        step("lies", "print('{not json')"),
        step("killed", "import os; os.kill(os.getpid(), 9)"),
    ]
    begin = time.monotonic()
    saved, rows = run(steps, tmp_path)
    assert time.monotonic() - begin < 15
    assert saved["machines"][0]["device"] == "NVIDIA Made Up"
    assert [row["status"] for row in rows.values()] == ["ok", "ok", *["failed"] * 5]
    assert rows["works"]["figures"] == {"a": 1}
    assert rows["fails"]["reason"] == "exit code 1: no luck"
    assert "out of memory" in rows["memory"]["reason"]
    assert rows["hangs"]["reason"] == "stopped at its time limit: began"
    assert rows["lies"]["reason"].startswith("its answer cannot be read: JSONDecodeError")
    assert rows["killed"]["reason"] == "exit code -9"
    assert rows["fails"]["tail"] == ["no luck"]


def test_the_next_slice_continues_where_the_budget_ended(tmp_path):
    count = tmp_path / "count"
    once = f"open({str(count)!r}, 'a').write('x'); print('{{}}')"
    steps = [step("machine", MACHINE), step("short", once), step("long", "print('{}')", limit=500, usual=400)]
    _, rows = run(steps, tmp_path, budget=60)
    assert rows["long"]["status"] == "skipped"
    assert "left of the budget, it takes about 400" in rows["long"]["reason"]
    saved, rows = run(steps, tmp_path, budget=1000)
    assert rows["long"]["status"] == "ok"
    assert count.read_text() == "x", "a step with a result ran again"
    assert len(saved["machines"]) == 2
    assert rows["short"]["machine"] == 0
    assert rows["long"]["machine"] == 1


def test_rows_measured_before_a_crash_are_kept():
    from steps import read_prove, read_rows

    row = {"layout": "packed", "status": "ok"}
    status, reason, figures = read_rows(1, f"ROW {json.dumps(row)}\nCUDA error: an illegal memory access")
    assert (status, figures["rows"]) == ("failed", [row])
    assert "illegal memory access" in reason
    assert read_rows(0, "")[0] == "failed"
    assert read_rows(None, "ROW " + json.dumps(row))[1].startswith("stopped at its time limit")
    assert read_prove(2, "error: unknown command 'prove'. Known: ...")[:2] == ("skipped", "not there")
    assert read_prove(1, '{"ok": false}')[0] == "failed"


def test_outcomes_of_single_tests_are_read(tmp_path):
    from steps import pytest as command
    from steps import read_xml

    (tmp_path / "test_three.py").write_text(
        "import pytest\ndef test_a(): pass\ndef test_b(): assert 1 == 2\ndef test_c(): pytest.skip('no such kernel')\n"
    )
    report = tmp_path / "report.xml"
    words = [*command(report, "--rootdir", str(tmp_path)), str(tmp_path / "test_three.py")]
    code = subprocess.run(words, capture_output=True, check=False, cwd=tmp_path).returncode
    status, reason, figures = read_xml(code, report)
    assert (status, figures["passed"], figures["failed"], figures["skipped"]) == ("failed", 1, 1, 1)
    assert "1 failed" in reason
    assert figures["failures"][0].startswith("test_b: ")
    assert figures["skips"] == ["test_c: no such kernel"] or "no such kernel" in figures["skips"][0]
    assert read_xml(1, tmp_path / "none.xml")[0] == "failed"


def test_files_with_gpu_tests_are_found_and_every_cell_appears_once():
    from steps import CELLS, FIRST_CELL, gpu_files, steps

    names = gpu_files()
    assert names[0] == "tests/gpu/test_attention.py"
    assert {"tests/training/test_no_waiting.py", "tests/model/test_liger_kernels.py"} < set(names)
    sizes = {
        (size, kind, row) for size in ("2b", "4b", "8b") for kind in ("full", "lora") for row in (4096, 8192, 16384)
    }
    assert {FIRST_CELL, *CELLS} == sizes
    planned = [step.name for step in steps(Path("work"), rehearse=False)]
    assert len(planned) == len(set(planned))
    assert planned[0] == "machine"


def test_only_missing_packages_are_unpacked(tmp_path):
    from wheels import check, unpack_missing

    for name in ("pytest", "made_up_package"):
        with zipfile.ZipFile(tmp_path / f"{name}-0.1-py3-none-any.whl", "w") as file:
            file.writestr(f"{name}/__init__.py", "")
            file.writestr(f"{name}-0.1.dist-info/METADATA", "")
    site = tmp_path / "site"
    for _ in range(2):
        assert unpack_missing(tmp_path, site) == ["made-up-package 0.1"]
    assert (site / "made_up_package" / "__init__.py").exists()
    assert not (site / "pytest").exists()
    assert check(tmp_path).startswith("2 wheels, 0.0 MB")
    with (tmp_path / "large-1-py3-none-any.whl").open("wb") as file:
        file.truncate(61_000_000)
    with pytest.raises(SystemExit, match="more than 60 MB"):
        check(tmp_path)


def results():
    cell = {"size": "4b", "train_type": "lora", "row_length": 8192, "status": "ok", "steps": 6, "seconds": 3.0}
    cell |= {"batch": 1, "accumulation": 1, "attention": "packed_sdpa", "computed_gib": 14.8}
    packed = cell | {"layout": "packed", "tokens_per_second": 24000.4, "samples_per_second": 51.2, "mfu": 0.412}
    plain = {key: cell[key] for key in ("size", "train_type", "row_length")} | {"layout": "plain", "status": "failed"}
    rows = [plain | {"reason": "out of memory"}, packed | {"peak_gib": 15.31}]
    versions = {"torch": "2.11.0", "transformers": "5.17.0", "liger-kernel": None}
    machine = {"device": "NVIDIA Made Up", "memory_gib": 79.2, "python": "3.12.3", "versions": versions}
    common = {"reason": "", "seconds": 31.0, "date": "2027-01-02 10:00", "machine": 0}
    steps = [
        common | {"step": "contract", "status": "failed", "reason": "1 failed", "figures": {"passed": 80, "failed": 1}},
        common | {"step": "bench, 4b lora 8192", "status": "failed", "figures": {"rows": rows}},
        {"step": "later", "status": "skipped", "reason": "1 s left | of it", "machine": 0},
    ]
    return {"schema": 1, "rehearsal": False, "commit": "abc", "machines": [machine], "steps": steps}


@pytest.fixture
def documents(tmp_path):
    for name in ("docs/performance.md", "recipes/README.md"):
        (tmp_path / name).parent.mkdir()
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def test_results_are_written_into_the_documents_and_again_without_change(documents):
    from report import update

    before = {path: path.read_text() for path in documents.rglob("*.md")}
    written = {path: path.read_text() for path in update(results(), documents)}
    performance, recipes = (written[documents / name] for name in ("docs/performance.md", "recipes/README.md"))
    assert "2027-01-02, commit abc: NVIDIA Made Up (79.2 GiB), Python 3.12.3, torch 2.11.0, transformers" in performance
    assert (
        "| 4b lora | 8,192 | packed | 15.3 | 15 | 24,000 | 51.2 | 41.2% | 6 steps, one row, packed_sdpa |"
        in performance
    )
    assert "| 4b lora | 8,192 | plain Trainer | - |  | - | - | - | out of memory |" in performance
    assert "| contract | failed | 31 | 80 passed; 1 failed; 1 failed |" in performance
    assert "| later | skipped | 0 | 1 s left / of it |" in performance
    assert "| 4b lora | 8,192 | 15.3 | 24,000 | 41.2% |" in recipes
    for path, text in before.items():
        head, tail = text.split("<!-- gpu:begin -->")[0], text.split("<!-- gpu:end -->")[1]
        assert written[path].startswith(head)
        assert written[path].endswith(tail)
    assert {path: path.read_text() for path in update(results(), documents)} == written


def test_a_rehearsal_and_a_document_without_markers_are_refused(documents):
    from report import update

    before = [path.read_text() for path in documents.rglob("*.md")]
    with pytest.raises(SystemExit, match="rehearsal"):
        update(results() | {"rehearsal": True}, documents)
    (documents / "recipes" / "README.md").write_text("no markers")
    with pytest.raises(SystemExit, match="needs one line"):
        update(results(), documents)
    assert (documents / "docs" / "performance.md").read_text() in before, (
        "one document was written although the other failed"
    )


def test_the_options_in_the_guide_exist():
    guide = (ROOT / "docs" / "performance.md").read_text().split("## On a GPU")[1].split("<!-- gpu:begin -->")[0]
    options = set(re.findall(r"--[a-z]+", guide))
    words = [sys.executable, str(HERE / "day.py"), "--help"]
    help_text = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    assert {"--budget", "--out", "--rehearse"} <= options <= set(re.findall(r"--[a-z]+", help_text))
