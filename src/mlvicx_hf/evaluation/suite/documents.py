"""One text as Markdown and as a single HTML file."""

import base64
from collections.abc import Iterable, Sequence
from importlib.resources import files
from typing import Any

from jinja2 import Template

from mlvicx_hf.common.text import markdown_table


class Document:
    """Headings, paragraphs, tables and pictures, in order."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.pictures: dict[str, bytes] = {}  # file name → PNG; Markdown refers to these files, HTML contains them
        self._markdown = [f"# {title}"]
        self._blocks: list[dict[str, Any]] = []  # for the HTML template

    def heading(self, text: str, level: int = 2) -> None:
        """Add a heading."""
        self._add(f"{'#' * level} {text}", "heading", text=text, level=level)

    def notice(self, text: str) -> None:
        """Add a paragraph that stands out."""
        self._add(f"**{text}**", "notice", text=text)

    def paragraph(self, text: str) -> None:
        """Add plain text."""
        self._add(text, "paragraph", text=text)

    def table(self, head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """Add a table of text."""
        rows = list(rows)
        self._add(markdown_table(head, rows), "table", head=head, rows=rows)

    def picture(self, name: str, png: bytes, caption: str) -> None:
        """Add a picture with its caption."""
        self.pictures[name] = png
        self._add(f"![{caption}](figures/{name})", "picture", text=caption, data=base64.b64encode(png).decode())

    def _add(self, markdown: str, kind: str, **content: Any) -> None:
        self._markdown.append(markdown)
        self._blocks.append({"kind": kind} | content)

    def to_markdown(self) -> str:
        """The text as Markdown."""
        return "\n\n".join(self._markdown) + "\n"

    def to_html(self) -> str:
        """The text as one HTML file that needs no other file."""
        source = (files(__package__) / "report.html.j2").read_text(encoding="utf-8")
        template = Template(source, autoescape=True, trim_blocks=True, keep_trailing_newline=True)
        return template.render(title=self.title, blocks=self._blocks)
