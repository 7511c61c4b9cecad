"""A hook of mkdocs: write the page reference/commands.md from the parsers of all commands."""

from __future__ import annotations

import argparse
import importlib
import os
from typing import Any

from mkdocs.structure.files import File, Files

from mlvicx_hf.commands import COMMANDS

INTRODUCTION = """# Commands

This page is made from the parsers of the commands, so it shows what `mlvicx COMMAND --help` shows. In a checkout,
the files in `scripts/` are the same commands under their earlier names.
"""


def on_files(files: Files, config: Any) -> Files:
    """Add the page to the site."""
    files.append(File.generated(config, "reference/commands.md", content=page()))
    return files


def page() -> str:
    """The page as Markdown: one section a command."""
    os.environ["COLUMNS"] = "110"  # the width that argparse wraps at
    parts = [INTRODUCTION]
    for name, purpose in COMMANDS.items():
        parser: argparse.ArgumentParser = importlib.import_module(f"mlvicx_hf.commands.{name}").parser()
        parts.append(f"## mlvicx {name}\n\n{purpose[0].upper()}{purpose[1:]}.\n\n```text\n{parser.format_help()}```\n")
    return "\n".join(parts)
