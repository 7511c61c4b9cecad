"""Progress bars that are quiet off the main process and readable when piped."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from tqdm import tqdm


class _Lines:
    """Standard error with a new line where a terminal would overwrite the old one."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        text = text.replace("\r", "\n").strip("\n")
        return self.stream.write(text + "\n") if text.strip() else 0

    def flush(self) -> None:
        self.stream.flush()


def progress_bar(total: int, description: str, unit: str, *, initial: int = 0, show: bool = True) -> tqdm[Any]:
    """Make a tqdm bar with rate and time left. A terminal redraws it; a file or pipe gets a line every ten seconds.

    Args:
        total: number of units.
        description: of the work.
        unit: name of a unit.
        initial: units already done, after a resume.
        show: false on every process but the main one.
    """
    terminal = sys.stderr.isatty()
    return tqdm(
        total=total,
        initial=initial,
        desc=description,
        unit=unit,
        disable=not show,
        dynamic_ncols=terminal,
        ncols=None if terminal else 110,
        position=None if terminal else 0,  # a bar inside another one would move the cursor up
        mininterval=0.2 if terminal else 10,
        maxinterval=10 if terminal else 60,
        file=sys.stderr if terminal else _Lines(sys.stderr),
    )


@contextmanager
def no_datasets_bars() -> Iterator[None]:
    """Keep `datasets` from drawing bars of its own."""
    import datasets

    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
