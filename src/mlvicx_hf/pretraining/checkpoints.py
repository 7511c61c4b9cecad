"""Checkpoints of a run: folders that are whole or absent. Their hashes are compared before they are used.

`checkpoint-STEP` holds what a run puts there, and `state.json` with the step, the settings, and the SHA-256 hash of
every other file. A kill at any moment leaves the newest whole checkpoint as it was: `new_folder` writes a checkpoint
under a hidden name and renames it; a checkpoint to remove is renamed to a hidden name first.
"""

import hashlib
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from mlvicx_hf.common.errors import UserError
from mlvicx_hf.common.files import new_folder, sha256, write_json

logger = logging.getLogger(__name__)

STATE, BEST = "state.json", "best.json"
_NAME = re.compile(r"checkpoint-(\d+)")


class DamagedCheckpointError(UserError):
    """A checkpoint is not what was written."""


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint."""

    path: Path  # its folder
    step: int  # number of steps that were done
    fixed: dict[str, Any]  # settings that must be the same in a run that resumes it
    machine: dict[str, Any]  # what may differ in that run, but changes the bits of its result

    def check_same_run(self, fixed: dict[str, Any], machine: dict[str, Any]) -> None:
        """Compare the settings with those of now. Another machine is a warning.

        Raises:
            UserError: lists all settings that differ.
        """
        if changed := _differences(self.fixed, fixed):
            raise UserError(
                f"{self.path} belongs to another run: {changed}; expected the same settings, or another output_dir and "
                "--init_from to start from its weights"
            )
        # An earlier version does not tell all of the machine.
        if changed := _differences(self.machine, {k: v for k, v in machine.items() if k in self.machine}):
            logger.warning("the bits may differ from those of a run that was not interrupted: %s", changed)


def _differences(before: dict[str, Any], now: dict[str, Any]) -> str:
    now = json.loads(json.dumps(now))  # as `before` was read: lists for tuples
    keys = sorted(k for k in before.keys() | now.keys() if before.get(k) != now.get(k))
    return "; ".join(f"{k} was {before.get(k)!r}, now {now.get(k)!r}" for k in keys)


def verify_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint, and compare its files with their hashes.

    Raises:
        DamagedCheckpointError: names the file and what is wrong with it.
    """
    name = STATE
    try:
        state = json.loads((path / STATE).read_text())
        checkpoint = Checkpoint(path, state["step"], state["fixed"], state["machine"])
        hashes = dict(state["sha256"])
        if hashes.pop(STATE) != _digest(checkpoint) or path.name != f"checkpoint-{checkpoint.step}":
            raise DamagedCheckpointError(f"{STATE} is not what was written")
        for name, expected in hashes.items():
            if (found := sha256(path / name)) != expected:
                raise DamagedCheckpointError(f"{name} has the SHA-256 hash {found[:12]}…, not {expected[:12]}…")
    except FileNotFoundError:
        raise DamagedCheckpointError(f"{name} is missing") from None
    except OSError as error:
        raise DamagedCheckpointError(f"{name} cannot be read: {error}") from error
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise DamagedCheckpointError(f"{STATE} is no state of a checkpoint ({error!r})") from error
    return checkpoint


def _digest(checkpoint: Checkpoint) -> str:
    content = [checkpoint.step, checkpoint.fixed, checkpoint.machine]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class Checkpoints:
    """The checkpoints of one run: the best one, and besides it a limited number of the newest."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit

    def path(self, step: int) -> Path:
        """Folder of the checkpoint of a step."""
        return self.folder / f"checkpoint-{step}"

    def paths(self) -> list[Path]:
        """All folders, whole or damaged, oldest first."""
        found = [path for path in self.folder.glob("checkpoint-*") if _NAME.fullmatch(path.name)]
        return sorted(found, key=_step)

    def newest_whole(self) -> Checkpoint | None:
        """The checkpoint to resume. A warning names each newer one that is damaged, and why.

        Returns:
            None if there are no checkpoints and no trained model, so that a start from the beginning loses nothing.

        Raises:
            UserError: all checkpoints are damaged, or there is a trained model without checkpoints.
        """
        reasons = []
        for path in reversed(self.paths()):
            try:
                return verify_checkpoint(path)
            except DamagedCheckpointError as error:
                reasons.append(f"{path.name}: {error}")
                logger.warning("%s is damaged: %s; falling back to the one before", path, error)
        if reasons:
            raise UserError(f"no checkpoint in {self.folder} is whole ({'; '.join(reasons)}); expected one to resume")
        if (self.folder / "model.safetensors").exists():
            raise UserError(f"{self.folder} holds a trained model and no checkpoint; expected one to resume")
        return None

    def begin(self, step: int) -> None:
        """Before a run goes on from a step, remove what kills left and set newer checkpoints aside: damaged ones.

        Raises:
            UserError: one is whole. Another process has written it since this one chose the step.
        """
        for left in self.folder.glob(".checkpoint-*"):  # folders, and the locks of folders
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        for path in self.paths():
            if _step(path) > step:
                with suppress(DamagedCheckpointError):
                    verify_checkpoint(path)
                    raise UserError(
                        f"{path} found, which another process has written since this one chose step {step}; expected "
                        "to go on from there: give the same command again"
                    )
                self.set_aside(path, "damaged")
        self._drop_oldest()

    def save(self, step: int, fixed: dict[str, Any], machine: dict[str, Any], write: Callable[[Path], None]) -> None:
        """Write the checkpoint of a step, whole or not at all, and remove the oldest one.

        `write` gets the folder and writes the files. If the step has a checkpoint already, nothing is written.

        Raises:
            OSError: the checkpoint cannot be written; names the one that is still good.
        """
        path = self.path(step)
        if path.is_dir():  # the run resumed it; replacing it would only put it at risk
            return
        with self.saying_what_is_left(path), new_folder(path) as folder:
            write(folder)
            checkpoint = Checkpoint(path, step, fixed, machine)
            hashes = {file.name: sha256(file) for file in sorted(folder.iterdir())} | {STATE: _digest(checkpoint)}
            write_json(folder / STATE, {"step": step, "fixed": fixed, "machine": machine, "sha256": hashes})
        self._drop_oldest()

    @contextmanager
    def saying_what_is_left(self, path: Path) -> Iterator[None]:
        """Add the last good checkpoint to the message of an OSError, while `path` is written."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            good = self.newest_good() or "none yet"
            raise OSError(f"{path} cannot be written: {error}; last good checkpoint: {good}") from error

    def newest_good(self) -> Path | None:
        """The newest whole checkpoint."""
        for path in reversed(self.paths()):
            with suppress(DamagedCheckpointError):
                return verify_checkpoint(path).path
        return None

    def set_aside(self, path: Path, why: str) -> None:
        """Rename a checkpoint to WHY-checkpoint-STEP, which no run resumes."""
        aside = path.with_name(f"{why}-{path.name}")
        shutil.rmtree(aside, ignore_errors=True)  # an earlier one
        if self._best().get("step") == _step(path):
            (self.folder / BEST).unlink()  # first: a kill must leave no note of a checkpoint that is gone
        os.replace(path, aside)

    def mark_best(self, score: float, step: int) -> bool:
        """Keep the checkpoint of a step as long as no other one has a higher score. The score must be finite.

        Returns:
            Whether the score is the highest so far. If so, `best.json` holds it and the step.
        """
        assert math.isfinite(score), f"score={score}"
        assert self.path(step).is_dir(), f"step {step} has no checkpoint"
        if score <= self._best().get("score", -math.inf):
            return False
        write_json(self.folder / BEST, {"step": step, "score": score})
        return True

    def _best(self) -> dict[str, Any]:
        """Step and score of the best checkpoint; empty without one."""
        path = self.folder / BEST
        try:
            return dict(json.loads(path.read_text())) if path.exists() else {}
        except ValueError as error:
            logger.warning("%s is damaged (%s): no checkpoint counts as the best", path, error)
            return {}

    def _drop_oldest(self) -> None:
        best = self._best().get("step")
        for path in self.paths()[: -self.limit]:
            if _step(path) != best:
                hidden = path.with_name(f".{path.name}.old")  # a kill during the removal leaves no half checkpoint
                os.replace(path, hidden)
                shutil.rmtree(hidden)


def _step(path: Path) -> int:
    return int(path.name.partition("-")[2])
