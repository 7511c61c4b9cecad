"""Drawings that end their process. Workers import this module, so it imports next to nothing."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable

import numpy as np

from mlvicx_hf.data.collections.base import Drawing


def draw() -> Drawing:
    return Drawing(np.eye(8, dtype=np.uint8) * 99)


def crash(number: signal.Signals) -> None:
    assert multiprocessing.parent_process() is not None  # never the tests themselves
    os.kill(os.getpid(), number)
    time.sleep(60)


def draw_and_crash() -> Drawing:
    crash(signal.SIGSEGV)
    return draw()


def draw_and_abort() -> Drawing:
    crash(signal.SIGABRT)
    return draw()


def draw_and_be_killed() -> Drawing:
    crash(signal.SIGKILL)
    return draw()


class CrashOnArrival:
    """A drawing that ends the worker before it can say what it is about to read."""

    def __reduce__(self) -> tuple[Callable[[signal.Signals], None], tuple[signal.Signals]]:
        return crash, (signal.SIGKILL,)
