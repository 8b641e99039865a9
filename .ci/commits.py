"""Check commit messages: a short imperative subject, an empty line, and a body that says why.

    python3 .ci/commits.py FILE         the message in FILE; exit code 1 and advice if something is wrong (the hook)
    python3 .ci/commits.py              advice on the commits that follow the one that added this file (CI); exit code 0
    python3 .ci/commits.py --strict     the same, with exit code 1 if there is advice

CI only advises, because a message that was published cannot be changed without rewriting history. Merges, reverts and
``fixup!`` commits are not looked at, nor is anything where git or the history is missing, as in a shallow clone.
"""

import re
import subprocess
import sys
from pathlib import Path

LIMIT = 72
"""Characters of a subject: ``git log --oneline`` shows them in a terminal of 80."""
GENERATED = re.compile(r"(Merge|Revert) |(fixup|squash|amend)! ")
"""Beginnings of the subjects that git writes itself."""
NOT_IMPERATIVE = re.compile(r"\w+(ed|ing|[^su]s)")
"""Forms of a verb that are not imperative: added, adding, adds."""
IMPERATIVE = {"bring", "embed", "feed", "need", "seed", "shed", "speed", "string", "alias", "bias", "canvas"}
"""Words that NOT_IMPERATIVE would take for such a form."""
NOT_VERBS = {"A", "An", "The", "This", "That", "Each", "Every", "No", "All", "Some", "When", "Whether", "What"}
"""Words that begin a statement instead of an instruction."""


def advice(message: str) -> list[str]:
    """Return what is wrong with a commit message, one sentence each; an empty list if it is fine."""
    text = message.split("# ------------------------ >8", 1)[0]  # below it stands the diff of `git commit -v`
    lines = [line.rstrip() for line in text.splitlines() if not line.startswith("#")]
    while lines and not lines[0]:
        lines.pop(0)
    if not lines:
        return []  # git itself refuses an empty message
    subject, rest = lines[0], lines[1:]
    if GENERATED.match(subject):
        return []
    found = []
    if len(subject) > LIMIT:
        found.append(f"The subject has {len(subject)} characters; please keep it within {LIMIT}.")
    if not looks_imperative(subject):
        found.append('Please begin the subject with a capitalised imperative: "Add ...", not "Added ...".')
    if rest and rest[0]:
        found.append("Please leave the second line empty; git takes the first paragraph as the subject.")
    if not any(rest):
        found.append("Please add a body that says why: the subject says what, the diff says how.")
    return found


def looks_imperative(subject: str) -> bool:
    """Return True if the first word is capitalised and not a past, continuous or third-person form."""
    word = subject.split()[0]
    if word in NOT_VERBS or not re.fullmatch(r"[A-Z][a-z]+(-[a-z]+)*", word):
        return False
    return word.lower() in IMPERATIVE or not NOT_IMPERATIVE.fullmatch(word)


def git(*arguments: str) -> str:
    """Return the output of a git command in the folder of this file; an empty text if it fails."""
    try:
        done = subprocess.run(
            ["git", *arguments], capture_output=True, text=True, check=False, cwd=Path(__file__).resolve().parent
        )
    except OSError:  # git is not installed
        return ""
    return done.stdout if done.returncode == 0 else ""


def new_commits() -> list[str]:
    """Return the commits that descend from the one that added this file, merges aside, the newest first.

    A shallow clone does not have that commit; its oldest commit then seems to add every file, so nothing is returned.
    """
    if git("rev-parse", "--is-shallow-repository").strip() != "false":
        return []
    added = git("log", "--diff-filter=A", "--format=%H", "--", Path(__file__).name).split()
    return git("rev-list", "--no-merges", "--ancestry-path", f"{added[-1]}..HEAD").split() if added else []


def main(arguments: list[str]) -> int:
    files = [argument for argument in arguments if argument != "--strict"]
    if files:
        found = advice(Path(files[0]).read_text(encoding="utf-8"))
        print("".join(f"commit message: {sentence}\n" for sentence in found), end="", file=sys.stderr)
        if found:
            print(
                "Nothing is lost: git commit -e -F .git/COMMIT_EDITMSG reopens the message; --no-verify skips this.",
                file=sys.stderr,
            )
        return bool(found)
    commits = new_commits()
    advised = 0
    for commit in commits:
        message = git("log", "-1", "--format=%B", commit)
        found = advice(message)
        advised += bool(found)
        print("".join(f"{commit[:9]} {message.splitlines()[0]}\n    {sentence}\n" for sentence in found), end="")
    print(f"commit messages: {advised} of {len(commits)} could be better")
    return int("--strict" in arguments and advised > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
