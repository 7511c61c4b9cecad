"""Take SIGTERM and SIGINT as a wish to stop: finish the step and save a checkpoint before the process ends."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# A launcher passes a signal on to its processes, which the terminal or scheduler may have sent it to as well. Within
# these seconds a second signal is the same one.
ECHO = 2.0
GRACE = 5  # seconds for a step that waits for its images


class StoppedError(Exception):
    """A signal, of this `number`, stopped the run after its checkpoint was saved."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number


class StopSignals:
    """Within its block, remember the first signal, and let a second one act as usual.

    Signals also act as usual outside the main thread, where Python allows no handlers, and if they are ignored.
    """

    def __init__(self) -> None:
        self.received = 0  # number of the signal; 0 without one
        self._time = 0.0
        self._before: dict[int, Any] = {}
        self._group: Any = None  # of processes that agree

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
        """Agree with all processes on the signal that stops them, 0 for none. All processes must call this."""
        if accelerator.num_processes == 1:
            return self.received
        import torch
        from torch import distributed

        if self._group is None:  # of its own, on the CPU: a GPU would first finish what it was given
            self._group = distributed.new_group(backend="gloo")
        received = torch.tensor([self.received])
        distributed.all_reduce(received, distributed.ReduceOp.MAX, self._group)
        return int(received)

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
    """Keep a DataLoader's workers running when a signal goes to the whole group, for its `worker_init_fn`.

    SIGTERM ends them some seconds later: the parent may have sent it, and waits for them at its own end.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, lambda number, frame: os._exit(0))
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(GRACE))
