"""Record which code made a result."""

from __future__ import annotations

import subprocess
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .machine import describe_hardware

if TYPE_CHECKING:  # importing torch takes seconds, which --help does not have
    import torch


@cache
def package_commit() -> str:
    """Find the commit of the package's checkout, once a process. Call it before long work, since it may change."""
    return git_commit(Path(__file__).parent)


def code_version() -> dict[str, str]:
    """Record the versions of package and libraries, and the git commit of the package's checkout."""
    import torch
    import transformers

    from mlvicx_hf import __version__

    return {
        "mlvicx_hf": __version__,
        "commit": package_commit(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def made_by(device: torch.device, processes: int = 1) -> dict[str, Any]:
    """Record which machine and which code made a result: `hardware` and `code`."""
    return {"hardware": describe_hardware(device, processes), "code": code_version()}


def git_commit(folder: Path) -> str:
    """Find the commit of a checkout; append "+changes" if tracked files differ.

    "unknown" outside a checkout, and in a folder that a repository around it does not track, such as site-packages.
    """
    try:
        if not _git(folder, "ls-files", "--", "."):
            return "unknown"
        commit = _git(folder, "rev-parse", "HEAD")
        return commit + ("+changes" if _git(folder, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(folder: Path, *words: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *words], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def describe_commit(commit: str) -> str:
    """Word a commit: the beginning of its hash, and whether the code differed from it."""
    plain = commit.removesuffix("+changes")
    return f"commit `{plain[:12]}`" + (" with local changes" if plain != commit else "")
