"""The site has three pages whose text lies elsewhere in the repository, so that nothing stands twice: see mkdocs.yml."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
ELSEWHERE = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "tests/README.md": "tests.md"}
"""Path in the repository -> page of the site."""

_LINK = re.compile(r"(\]\()([^)\s#]+)(#[^)\s]*)?\)")


def on_files(files: Any, config: Any) -> Any:
    """Add them."""
    for source, page in ELSEWHERE.items():
        files.append(File.generated(config, page, content=_for_the_site(source, (ROOT / source).read_text(encoding="utf-8"))))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links from the pages of docs/ to the three."""
    return markdown if page.file.src_uri in ELSEWHERE.values() else _for_the_site(f"docs/{page.file.src_uri}", markdown)


def _for_the_site(source: str, text: str) -> str:
    """A file's links as the site has them, where they lead to a page of it."""

    def moved(link: re.Match[str]) -> str:
        target = link.group(2)
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if path in ELSEWHERE:
            target = ELSEWHERE[path]
        elif path.startswith("docs/"):
            target = path.removeprefix("docs/")
        return f"{link.group(1)}{target}{link.group(3) or ''})"

    return _LINK.sub(moved, text)
