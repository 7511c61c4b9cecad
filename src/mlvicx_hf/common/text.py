"""Text that several rooms use."""

from collections.abc import Collection, Iterable, Sequence

NOTICE = "Research use only. Not a medical device; not for clinical decisions."


def some(items: Iterable[str], limit: int = 5) -> str:
    """List the first few items, for an error message."""
    listed = list(items)
    return ", ".join(listed[:limit]) + (", …" if len(listed) > limit else "")


def number(value: float | str, form: str = ".4f") -> str:
    """Write a score. What is no number, such as "n/a", stays as it is."""
    return value if isinstance(value, str) else format(value, form)


def number_range(values: Collection[int]) -> str:
    """Write the least and the greatest of some counts; one number if they are equal."""
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Write a Markdown table. The first column is aligned to the left, the others to the right."""
    lines = [list(head), ["---", *["---:"] * (len(head) - 1)], *map(list, rows)]
    return "\n".join("| " + " | ".join(" ".join(c.replace("|", "\\|").split()) for c in line) + " |" for line in lines)
