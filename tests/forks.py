"""Python code in processes that begin with PyTorch imported, which start in a few seconds less than fresh ones.

They are forks of a process that has imported what is slow and reads no variables of the Hub. `mlvicx_hf`, transformers
and huggingface_hub are not imported yet, and neither are their settings read.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

HERE = Path(__file__)
MODULES = ("torch", "torchvision", "torch._dynamo", "scipy.optimize", "sklearn.metrics", "pandas", "pyarrow.parquet")
LATER = ("huggingface_hub", "transformers", "timm", "datasets", "mlvicx_hf")


def run_forked(
    code: str, *words: str, environment: dict[str, str], folder: Path, timeout: float
) -> subprocess.CompletedProcess[str]:
    """Run code as `python -c code words` does.

    Args:
        code: of a main module.
        words: `sys.argv[1:]`.
        environment: all variables of the process; OMP_NUM_THREADS, read by PyTorch, is always 1.
        folder: where it runs.
        timeout: seconds after which it is killed.

    Raises:
        subprocess.TimeoutExpired: it was killed.
    """
    with tempfile.TemporaryDirectory() as logs:
        streams = [Path(logs, name) for name in ("stdout", "stderr")]
        request = {"code": code, "words": words, "environment": environment, "folder": str(folder), "seconds": timeout}
        server = _server()
        assert server.stdin is not None
        assert server.stdout is not None
        print(json.dumps(request | {"streams": [*map(str, streams)]}), file=server.stdin, flush=True)
        returncode = json.loads(server.stdout.readline())
        if returncode == -signal.SIGALRM:
            raise subprocess.TimeoutExpired(code, timeout)
        return subprocess.CompletedProcess(["-c", *words], returncode, *(stream.read_text() for stream in streams))


@cache
def _server() -> subprocess.Popen[str]:
    """Started once for each process of tests."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    server = subprocess.Popen(
        [sys.executable, str(HERE)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    atexit.register(server.communicate)  # the end of its input ends it
    return server


# -- in the process that forks -----------------------------------------------------------------------------------------


def _next_request() -> dict[str, object]:
    """Return in a fork, with what it has to run; the process itself answers with exit codes until its input ends."""
    for name in MODULES:
        __import__(name)
    assert not sys.modules.keys() & set(LATER)
    for line in sys.stdin:
        pid = os.fork()
        if not pid:
            return dict(json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
    sys.exit()


def _become(request: dict[str, object]) -> None:
    """Take variables, folder, streams and arguments of the request."""
    streams, environment, seconds = request["streams"], request["environment"], request["seconds"]
    assert isinstance(streams, list)
    assert isinstance(environment, dict)
    assert isinstance(seconds, int | float)
    signal.alarm(int(seconds))
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(str(request["folder"]))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, stream in enumerate(streams, 1):
        os.dup2(os.open(stream, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    paths = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    del sys.path[0]  # this file's folder
    sys.path[:0] = ["", *(path for path in paths if path not in sys.path)]
    words = request["words"]
    assert isinstance(words, list)
    sys.argv[:] = ["-c", *words]


if __name__ == "__main__":
    request = _next_request()
    _become(request)
    # The interpreter deals with exceptions, exit codes and functions at exit as for any main module.
    exec(compile(str(request["code"]), "<string>", "exec"), {"__name__": "__main__"})
