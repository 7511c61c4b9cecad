"""Words that several rooms use."""

from __future__ import annotations

from collections.abc import Iterable

NOTICE = "Research use only. Not a medical device; not for clinical decisions."


def some(items: Iterable[str], limit: int = 5) -> str:
    """The first few items for an error message."""
    listed = list(items)
    return ", ".join(listed[:limit]) + (", …" if len(listed) > limit else "")
