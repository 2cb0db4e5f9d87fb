"""What `mkdocs.yml` needs beyond plugins: the README as front page, links to files outside docs/, docstrings."""

import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
LINK = re.compile(r"\[([^\]]+)\]\(([^)#:\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Adds README.md as the front page."""
    files.append(File.generated(config, "index.md", content=(ROOT / "README.md").read_text()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Replaces links to files of the repository that the site does not hold by their text and path."""
    front = page.file.src_uri == "index.md"
    folder = ROOT if front else (DOCS / page.file.src_uri).parent

    def replaced(link: re.Match[str]) -> str:
        text, path, fragment = link[1], (folder / link[2]).resolve(), link[3] or ""
        if path.is_relative_to(DOCS) or not path.exists():
            return f"[{text}]({link[2].removeprefix('docs/') if front else link[2]}{fragment})"
        path = str(path.relative_to(ROOT))
        return text if "`" in text or text == path else f"{text} (`{path}`)"

    return LINK.sub(replaced, markdown)


class Docstrings(griffe.Extension):
    """Reads the docstrings of this code: sections without a blank line before them, comments that document an attribute."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = re.sub(r"\n(?=(Args|Returns|Raises):\n)", "\n\n", obj.docstring.value)

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: Any) -> None:
        if attr.docstring is None and attr.lineno and attr.endlineno:
            lines = attr.lines_collection[attr.filepath]
            own, before = lines[attr.endlineno - 1].partition("  # ")[2], lines[attr.lineno - 2].strip()
            comment = own or before.removeprefix("# ") * before.startswith("# ")
            if comment and not comment.startswith("pyright:"):
                attr.docstring = griffe.Docstring(comment, parent=attr)
