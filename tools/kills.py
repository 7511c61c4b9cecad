"""Start commands in a moment, kill them with SIGKILL, and compare what they leave.

`Forks` is a process that has imported what commands need. It runs each of them in a fork of itself, so that a start
costs a few milliseconds instead of ten seconds. A command is killed at any moment (`process.kill()`), or right before
its n-th change of the file system (`kill_before`):

    with Forks() as forks:
        process = forks.start("pretrain", *flags, folder=run, kill_before=7)
        assert process.wait() == KILLED

A change is a file opened for writing, or something made, renamed or removed, whose path contains `folder`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

KILLED = -signal.SIGKILL
DEADLINE = 600.0  # seconds for one command
# Events of Python's audit hooks, and where their arguments have the folder that a path is relative to.
CHANGES = {"open": None, "os.mkdir": 2, "os.rename": 2, "os.remove": 1, "os.rmdir": 1, "shutil.rmtree": 1}


class Forks:
    """Runs commands of `mlvicx` in forks of one process; use it in a `with` statement.

    Args:
        modules: imported once, before the forks.
        without: modules that commands do not find, as if they were not installed.
    """

    def __init__(self, modules: Sequence[str] = ("mlvicx_hf.pretraining.loop",), without: Sequence[str] = ()) -> None:
        self._folder = tempfile.TemporaryDirectory()
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        words = [sys.executable, __file__, json.dumps([list(modules), list(without)])]
        self._server = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True
        )
        self._processes: list[Forked] = []

    def __enter__(self) -> Forks:
        return self

    def __exit__(self, *error: object) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.kill()
        os.killpg(self._server.pid, signal.SIGKILL)
        self._server.communicate()
        self._folder.cleanup()

    def start(self, *words: object, folder: object = "/", kill_before: int | None = None) -> Forked:
        """Start a command in a process group of its own.

        Args:
            words: name and flags of the command.
            folder: part of the path of every change that counts.
            kill_before: number of the change, counted from 0; None for no kill.
        """
        log = Path(self._folder.name, str(len(self._processes)))
        log.mkdir()
        request = {"words": [*map(str, words)], "folder": str(folder), "kill_before": kill_before, "log": str(log)}
        self._processes.append(Forked(self, self._ask(request), log))
        return self._processes[-1]

    def run(self, *words: object, folder: object = "/", kill_before: int | None = None) -> Forked:
        """Start a command and wait for its end; see `start`."""
        process = self.start(*words, folder=folder, kill_before=kill_before)
        process.wait()
        return process

    def _ask(self, request: dict[str, Any]) -> Any:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        print(json.dumps(request), file=self._server.stdin, flush=True)
        return json.loads(self._server.stdout.readline())


class Forked:
    """A command that was started.

    Attributes:
        pid: of its process, which is the number of its group, too.
        code: exit code, negative after a signal; None while it runs.
    """

    def __init__(self, forks: Forks, pid: int, log: Path) -> None:
        self.pid, self._forks, self._log = pid, forks, log
        self.code: int | None = None

    @property
    def output(self) -> str:
        """What it has printed, on either stream."""
        file = self._log / "output"
        return file.read_text() if file.exists() else ""

    @property
    def changes(self) -> list[list[str]]:
        """Event and path, for os.rename both paths, of the changes that it has made."""
        return [json.loads(line) for line in (self._log / "changes").read_text().splitlines()]

    def poll(self) -> int | None:
        """Exit code; None while it runs."""
        if self.code is None:
            self.code = self._forks._ask({"poll": self.pid})
        return self.code

    def wait(self, seconds: float = DEADLINE) -> int:
        """Wait for its end; after so many seconds kill it. Returns the exit code."""
        end = time.monotonic() + seconds
        while self.poll() is None:
            if time.monotonic() > end:
                self.kill()
            time.sleep(0.005)
        assert self.code is not None
        return self.code

    def kill(self, group: bool = True) -> None:
        """Send SIGKILL to the process, and to the processes that it has started unless `group` is false."""
        (os.killpg if group else os.kill)(self.pid, signal.SIGKILL)


def contents(folder: Path, ignored: Sequence[str] = ()) -> dict[str, bytes]:
    """Bytes of all files in a folder, by relative path.

    Args:
        folder: which may be absent.
        ignored: names of files to leave out.
    """
    files = [file for file in folder.rglob("*") if file.is_file() and file.name not in ignored]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def differences(one: Path, other: Path, ignored: Sequence[str] = ()) -> list[str]:
    """Files that differ between two folders, or that only one of them has."""
    left, right = contents(one, ignored), contents(other, ignored)
    return sorted(name for name in left.keys() | right.keys() if left.get(name) != right.get(name))


# -- in the process that forks -----------------------------------------------------------------------------------------


def _serve(modules: list[str], without: list[str]) -> None:
    for name in without:
        sys.modules[name] = None  # type: ignore[assignment]  # import raises ImportError then
    for name in ("mlvicx_hf.commands", *modules):
        __import__(name)
    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork()
            if not answer:
                _run(**request)
        print(json.dumps(answer), flush=True)


def _run(words: list[str], folder: str, kill_before: int | None, log: str) -> None:
    """The command, in the fork."""
    from mlvicx_hf.commands import main

    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
    output = os.open(f"{log}/output", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    changes = os.open(f"{log}/changes", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    here, count = os.getpid(), 0

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event not in CHANGES or os.getpid() != here:  # workers change nothing that is compared
            return
        place = CHANGES[event]
        if place is None and not (isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        path = str(arguments[0])
        if place is not None and arguments[place] not in (-1, None):
            path = f"{os.readlink(f'/proc/self/fd/{arguments[place]}')}/{path}"
        if folder not in path:
            return
        if count == kill_before:
            os.write(1, f"\nkilled before {event} {'/'.join(Path(path).parts[-2:])}\n".encode())
            os.kill(here, signal.SIGKILL)
        count += 1
        paths = [path, str(arguments[1])] if event == "os.rename" else [path]
        os.write(changes, (json.dumps([event, *paths]) + "\n").encode())

    sys.addaudithook(watch)
    code = 1
    try:
        main(words)
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve(*json.loads(sys.argv[1]))
