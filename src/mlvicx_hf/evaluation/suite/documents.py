# Copyright 2026 The mlvicx_hf authors. Licensed under the Apache License, Version 2.0.
"""One text as Markdown and as a single HTML file."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape

from mlvicx_hf.common.text import markdown_table

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #1c2733; }
h1, h2, h3 { line-height: 1.25; } h2 { margin-top: 2em; border-bottom: 1px solid #d5dce3; }
table { border-collapse: collapse; margin: 1em 0; font-size: 13px; display: block; overflow-x: auto; }
th, td { padding: 3px 9px; border-bottom: 1px solid #e3e8ee; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } th { background: #f3f6f9; }
img { max-width: 100%; } .notice { background: #fff4d6; padding: 0.6em 1em; border-radius: 4px; }
"""


@dataclass
class Document:
    """Headings, paragraphs, tables and pictures, in order.

    Attributes:
        title: of the whole.
        markdown: its lines in Markdown.
        html: its elements.
        pictures: file name → PNG; Markdown refers to them, HTML contains them.
    """

    title: str
    markdown: list[str] = field(default_factory=list)
    html: list[str] = field(default_factory=list)
    pictures: dict[str, bytes] = field(default_factory=dict)

    def heading(self, text: str, level: int = 2) -> None:
        """A heading."""
        self.markdown.append(f"{'#' * level} {text}")
        self.html.append(f"<h{level}>{escape(text)}</h{level}>")

    def paragraph(self, text: str, notice: bool = False) -> None:
        """A paragraph of plain text."""
        self.markdown.append(f"**{text}**" if notice else text)
        start = '<p class="notice">' if notice else "<p>"
        self.html.append(f"{start}{escape(text)}</p>")

    def table(self, head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """A table of text."""
        rows = [list(row) for row in rows]
        self.markdown.append(markdown_table(head, rows))
        cells = ["".join(f"<th>{escape(cell)}</th>" for cell in head)]
        cells += ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows]
        lines = "\n".join(f"<tr>{row}</tr>" for row in cells)
        self.html.append(f"<table>\n{lines}\n</table>")

    def picture(self, name: str, png: bytes, caption: str) -> None:
        """A picture with what it shows."""
        self.pictures[name] = png
        self.markdown.append(f"![{caption}](figures/{name})")
        data = base64.b64encode(png).decode()
        self.html.append(f'<img alt="{escape(caption)}" src="data:image/png;base64,{data}">')

    def to_markdown(self) -> str:
        """The text as Markdown."""
        return "\n\n".join([f"# {self.title}", *self.markdown]) + "\n"

    def to_html(self) -> str:
        """The text as one HTML file that needs nothing else."""
        head = f'<meta charset="utf-8"><title>{escape(self.title)}</title><style>{STYLE}</style>'
        body = "\n".join([f"<h1>{escape(self.title)}</h1>", *self.html])
        return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'
