"""Models by the name or folder that a user gives."""

from __future__ import annotations

from pathlib import Path


def check_source(source: str) -> str:
    """Refuse a path that does not exist before the Hub client takes it for the name of a repository.

    Args:
        source: folder or Hub name ("name" or "organisation/name").

    Returns:
        The source.

    Raises:
        FileNotFoundError: a path, by its looks, at which there is no model.
    """
    path = Path(source)
    if path.is_dir() and not (path / "config.json").is_file():
        raise FileNotFoundError(f"{source} holds no config.json; expected the folder of a saved model")
    if not path.exists() and (source.startswith(("/", ".", "~")) or source.count("/") > 1 or not source):
        raise FileNotFoundError(f"{source!r} found; expected a folder that exists, or a name on the Hub")
    return source
