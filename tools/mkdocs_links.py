"""Hook of mkdocs: links from a page to files outside docs/ become the file's path, since the site holds docs/ only.

That the files exist is checked by tests/test_docs.py.
"""

from __future__ import annotations

import posixpath
import re
from typing import Any

LINK = re.compile(r"\[([^\]]+)\]\(((?:\.\./)+[^)#\s]*)(?:#[^)]*)?\)")


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Called by mkdocs for each page, before the Markdown is parsed."""
    folder = posixpath.dirname(f"docs/{page.file.src_uri}")

    def path_instead(link: re.Match[str]) -> str:
        text, path = link[1], posixpath.normpath(posixpath.join(folder, link[2]))
        if path.startswith("docs/"):
            return link[0]
        named = text.strip("`/") in (path, posixpath.basename(path))
        return f"`{path}`" if named else f"{text} (`{path}`)"

    return LINK.sub(path_instead, markdown)
