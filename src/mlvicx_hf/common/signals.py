"""SIGTERM and SIGINT as a wish to stop: the step is finished and a checkpoint saved before the process ends."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# A launcher passes on a signal that a terminal or scheduler has sent to its processes as well: within these seconds
# it is the same one.
ECHO = 2.0
GRACE = 5  # seconds in which a step is finished that waits for its images


class StoppedError(Exception):
    """A run that a signal has stopped, after its checkpoint was saved.

    Attributes:
        number: of the signal.
    """

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number


class StopSignals:
    """While it is entered, the first signal is remembered and a second one acts as it did before.

    Outside the main thread, where Python allows no handlers, signals act as before, and so does one that is ignored.

    Attributes:
        received: number of the signal; 0 without one.
    """

    def __init__(self) -> None:
        self.received = 0
        self._time = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def agreed(self, accelerator: Any) -> int:
        """The signal that stops all processes after this step, 0 for none; all of them must ask.

        Args:
            accelerator: of `accelerate`, whose processes agree.
        """
        if accelerator.num_processes == 1:
            return self.received
        import torch

        return int(accelerator.gather(torch.tensor([self.received], device=accelerator.device)).max())

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self.received:
            self.received, self._time = number, time.monotonic()
        elif time.monotonic() - self._time > ECHO:
            self._restore()
            signal.raise_signal(number)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()


def leave_signals_to_the_main_process(worker: int) -> None:
    """For a DataLoader's `worker_init_fn`: a signal to the whole group must not take the workers from under the step.

    SIGTERM ends them some seconds later all the same: it may be the parent's own, which waits for them at its end.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, lambda number, frame: os._exit(0))
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(GRACE))
