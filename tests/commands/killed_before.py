"""Runs a script again and again in forked processes, each killed before a certain change of the file system.

    python killed_before.py folder script.py words

Every line on stdin holds a number and further words of the script. The script then runs in a fork, where everything is
imported already, and is killed with SIGKILL before the change of that number, counted from 0; with -1 it is left alone.
Files count as changed where they are opened for writing below the folder. The answer on stdout is one line of JSON:
exit code, changes that were made, and what the script printed.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")


def child(folder: str, script: str, words: list[str], number: int, log: Path) -> None:
    """Run the script, with its output in the log's folder; never returns."""
    with (log.parent / "output").open("w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    changes = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_TRUNC)
    count = 0

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event == "open":
            written = isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
            if not (written and str(arguments[0]).startswith(folder)):
                return
        elif event not in CHANGES:
            return
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1
        os.write(changes, (json.dumps([event, *map(str, arguments[:2])]) + "\n").encode())

    sys.argv = [script, *words]
    sys.addaudithook(watch)
    code = 0
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as error:
        code = int(error.code or 0)
    finally:
        sys.stdout.flush()
        os._exit(code)


def main() -> None:
    """Answer one line after another."""
    import mlvicx_hf.data.prepare  # noqa: F401

    sys.modules["matplotlib"] = None  # type: ignore[assignment]  # as if not installed: drawing takes a second

    folder, script, *words = sys.argv[1:]
    with tempfile.TemporaryDirectory() as own:
        log = Path(own, "changes")
        for line in sys.stdin:
            number, *more = line.split()
            pid = os.fork()
            if not pid:
                child(folder, script, [*words, *more], int(number), log)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            changes = [json.loads(change) for change in log.read_text().splitlines()]
            answer = {"code": code, "changes": changes, "output": log.with_name("output").read_text()}
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
