""".ci/commits.py advises on commit messages, and looks only at commits after the one that added it."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / ".ci" / "commits.py"
BODY = "\n\nThe reason for it.\n"


def check(message, tmp_path):
    """Run the hook on a message; return exit code and advice."""
    (tmp_path / "message").write_text(message)
    command = [sys.executable, SCRIPT, tmp_path / "message"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    "message",
    [
        f"Add a test{BODY}",
        f"Pass the rank to the loader{BODY}",
        f"Speed up planning{BODY}",
        f"Re-read headers after a timeout{BODY}",
        f"{'Move ' * 14}it{BODY}",  # 72 characters
        "\n# a comment of git\nAdd a test\n\n# another\nIt fails without the fix.\n",
        f"Add a test{BODY}# ------------------------ >8 ------------------------\n+Fixed",
        "Merge branch 'h7'",
        'Revert "Add a test"',
        "fixup! Add a test",
    ],
)
def test_good_messages_pass(message, tmp_path):
    assert check(message, tmp_path) == (0, "")


@pytest.mark.parametrize(
    ("message", "advice"),
    [
        (f"{'Move ' * 14}it.{BODY}", "has 73 characters; please keep it within 72"),
        (f"Added a test{BODY}", "imperative"),
        (f"Adding a test{BODY}", "imperative"),
        (f"Adds a test{BODY}", "imperative"),
        (f"add a test{BODY}", "capitalised"),
        (f"docs: add a page{BODY}", "capitalised"),
        (f"The loader has an end{BODY}", "imperative"),
        ("Add a test\n", "add a body that says why"),
        ("Add a test\n\n# only a comment\n", "add a body that says why"),
        ("Add a test\nat once\n", "second line empty"),
    ],
)
def test_other_messages_get_advice_and_the_way_on(message, advice, tmp_path):
    code, text = check(message, tmp_path)
    assert code == 1
    assert advice in text
    assert "--no-verify" in text


def git(folder, *arguments):
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "core.hooksPath=/dev/null"]
    command = ["git", *identity, *arguments]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def repository(tmp_path):
    """An old commit, one that adds the script, two on it (one bad), and a bad one of a branch from before, merged."""
    folder = tmp_path / "repository"
    folder.mkdir()
    git(folder, "init", "--initial-branch=main")

    def commit(message):
        git(folder, "commit", "--allow-empty", "-m", message)

    commit("old and bad")
    (folder / ".ci").mkdir()
    (folder / ".ci" / "commits.py").write_text(SCRIPT.read_text())
    git(folder, "add", ".")
    commit("add the script badly")
    commit("Improve it\n\nFor a reason.")
    commit("improved again")
    git(folder, "checkout", "-b", "side", "HEAD~3")
    commit("beside and bad")
    git(folder, "checkout", "main")
    git(folder, "merge", "--no-ff", "side", "-m", "merged, badly said")
    return folder


def history(folder, *arguments):
    command = [sys.executable, folder / ".ci" / "commits.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_ci_looks_at_commits_that_follow_the_script_and_advises_without_failing(repository):
    done = history(repository)
    assert (done.returncode, done.stderr) == (0, "")
    assert "1 of 2 could be better" in done.stdout
    assert "improved again" in done.stdout
    assert all(old not in done.stdout for old in ("old and bad", "add the script", "beside", "merged"))
    assert history(repository, "--strict").returncode == 1


def test_ci_says_nothing_of_a_shallow_clone_or_without_git(repository, tmp_path):
    git(tmp_path, "clone", "--depth", "1", f"file://{repository}", "shallow")
    assert "0 of 0" in history(tmp_path / "shallow", "--strict").stdout
    (tmp_path / "none" / ".ci").mkdir(parents=True)
    (tmp_path / "none" / ".ci" / "commits.py").write_text(SCRIPT.read_text())
    assert "0 of 0" in history(tmp_path / "none", "--strict").stdout


def test_the_hooks_run_what_make_lint_and_the_script_run():
    (repo,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repo["repo"] == "local", "a hook from elsewhere would have to be downloaded"
    entries = {hook["stages"][0]: hook["entry"] for hook in repo["hooks"]}
    assert entries == {"pre-commit": "make --no-print-directory lint", "commit-msg": "python3 .ci/commits.py"}
    plain = {name: (ROOT / ".ci/hooks" / name).read_text() for name in entries}
    assert entries["pre-commit"] in plain["pre-commit"]
    assert ".ci/commits.py" in plain["commit-msg"]
    assert all((ROOT / ".ci/hooks" / name).stat().st_mode & 0o111 for name in entries)
