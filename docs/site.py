"""A hook of mkdocs: adds pages from outside docs/ to the site, and files that the pages link to.

Pages link to files of the repository: the README to docs/, a guide to a recipe or a test. On the site the pages of
PAGES have the names given there, and any other file becomes a text file below ``files/``. A link to a file that does
not exist is left unchanged, so that ``mkdocs build --strict`` fails on it.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "recipes/README.md": "recipes/index.md",
    "examples/flare25/README.md": "examples/flare25.md",
    "qwenvl_ft/data/README.md": "data_path.md",
}
"""Page in the repository, outside of docs/ -> its place on the site."""
LINK = re.compile(r"(!?\[[^\]]*\]\()([^)\s#]+)(#[^)\s]*)?(\))")


def place(path: str) -> str | None:
    """Return where a file of the repository is on the site; None if there is no such file."""
    if path in PAGES:
        return PAGES[path]
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"files/{path}.txt" if (ROOT / path).is_file() else None


def origin(page: str) -> str:
    """Return where a page of the site is in the repository; the inverse of `place` for pages."""
    return {new: old for old, new in PAGES.items()}.get(page, f"docs/{page}")


def linked(text: str, page: str) -> set[str]:
    """Return the files of the repository that a page links to."""
    folder = posixpath.dirname(origin(page))
    targets = (match[2] for match in LINK.finditer(text) if "://" not in match[2])
    return {posixpath.normpath(posixpath.join(folder, target)) for target in targets}


def relink(text: str, page: str) -> str:
    """Return a page's Markdown with each relative link led to the target's place on the site."""
    folder = posixpath.dirname(origin(page))

    def led(match: re.Match[str]) -> str:
        if "://" in match[2] or match[2].startswith("mailto:"):
            return match[0]
        target = place(posixpath.normpath(posixpath.join(folder, match[2])))
        if target is None:
            return match[0]
        return f"{match[1]}{posixpath.relpath(target, posixpath.dirname(page) or '.')}{match[3] or ''}{match[4]}"

    return LINK.sub(led, text)


def on_files(files: Any, config: Any) -> Any:
    """Add PAGES, and each file outside of docs/ that a page links to."""
    from mkdocs.structure.files import File

    for source, target in PAGES.items():
        files.append(File.generated(config, target, content=(ROOT / source).read_text(encoding="utf-8")))
    wanted = {path for page in files.documentation_pages() for path in linked(page.content_string, page.src_uri)}
    for path in sorted(wanted):
        target = place(path)
        if target is not None and target.startswith("files/"):
            files.append(File.generated(config, target, content=(ROOT / path).read_bytes()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    return relink(markdown, page.file.src_uri)
