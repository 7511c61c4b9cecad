"""Find out before the first step how much memory and time a run needs, and which micro-batches fit.

Trial steps on random images run through the objective before it is compiled and before several processes share it, so
that no process waits for another. They leave no trace in the run.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import find_executable_batch_size, gather_object, release_memory
from torch import Tensor

from mlvicx_hf.common.errors import UserError
from mlvicx_hf.common.machine import available_memory
from mlvicx_hf.objectives import Objective

FEWEST_IMAGES = 2  # of a micro-batch
BETWEEN = 1.1  # memory of the maps on the CPU over what autograd saves of them; the rest is temporary


@dataclass(frozen=True)
class ResourceEstimate:
    """What a training process needs."""

    memory: int  # bytes at the peak, of the GPU or of the process
    on_gpu: bool  # which of the two
    seconds: float | None  # of a step, without reading images and without communication; None if not known

    def describe(self, steps: int) -> str:
        """A line about a run of `steps` steps."""
        memory = f"about {self.memory / 2**30:.1f} GiB of {'GPU memory' if self.on_gpu else 'memory'} at the peak"
        if self.seconds is None:
            return f"{memory}; the time of a compiled step is measured after the first ones"
        whole = timedelta(seconds=round(self.seconds * steps))
        return f"{memory}; about {self.seconds:.2g} s a step, {whole} for {steps} steps"


class Trial:
    """Trial steps of an objective that leave it as it was: weights, statistics, random numbers.

    The mean square of the embeddings stands for the loss. The loss's matrices are small beside the maps, and under
    torch.distributed the loss would wait for other processes.

    Args:
        accelerator: of the run, for its precision.
        objective: on its device, neither compiled nor wrapped.
        make_views: gives the views of B images; takes no numbers of torch's global generators.
        share: images of a process.
        buffers: values that the optimiser keeps for each weight.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        objective: Objective,
        make_views: Callable[[int], Sequence[Tensor]],
        share: int,
        buffers: int = 1,
    ) -> None:
        self.accelerator, self.objective, self.make_views, self.share = accelerator, objective, make_views, share
        self.device = accelerator.device
        self.unreached: list[str] = []  # trained weights that had no gradient in the last trial
        self.weights = sum(p.numel() * p.element_size() for p in objective.parameters() if p.requires_grad)
        # The optimiser's buffers, and DDP's buckets, which hold the gradients once more.
        self.besides = self.weights * (buffers + (accelerator.num_processes > 1))
        if self.device.type != "cuda":
            self._count()

    def _count(self) -> None:
        """Measure the constants of `process_memory`, in steps so small that they fit anywhere."""
        before = _resident()
        few, more = self._saved(FEWEST_IMAGES), self._saved(2 * FEWEST_IMAGES)
        self.image_bytes = (more - few) / FEWEST_IMAGES  # that autograd saves for an image, and whatever their number
        self.fixed_bytes = few - FEWEST_IMAGES * self.image_bytes  # such as weights of half precision
        trial = self.weights + more  # freed by now, but perhaps kept by the C library
        self.base = max(before, _resident() - trial)  # of the process: code, weights, what torch keeps once it ran

    def estimate(self, steps: int, timed: bool = True) -> ResourceEstimate:
        """What a step of `steps` micro-batches needs. `timed=False` leaves out the time, as for a model to be compiled.

        On a GPU this is the memory of a trial step. On the CPU it is computed by `process_memory`, unless the process
        is larger after the trial step.

        Raises:
            UserError: unequal micro-batches, or smaller than two images.
        """
        size, on_gpu = micro_batch_size(self.share, steps), self.device.type == "cuda"
        if not on_gpu:
            seconds = self.run(size) if timed else None
            return ResourceEstimate(max(self.process_memory(size), _resident() + self.besides), on_gpu, seconds)
        self.run(FEWEST_IMAGES)  # what is done but once is not timed
        torch.cuda.reset_peak_memory_stats(self.device)
        seconds = self.run(size)
        memory = torch.cuda.max_memory_allocated(self.device) + self.besides
        torch.cuda.reset_peak_memory_stats(self.device)
        return ResourceEstimate(memory, on_gpu, seconds if timed else None)

    def describe_choice(self, steps: int) -> str:
        """A line about the choice of `steps` micro-batches."""
        if steps == 1:
            return f"find_batch_size: all {self.share} images of a process fit into the memory at once"
        return (
            f"find_batch_size: {steps} micro-batches of {self.share // steps} images a process fit into the memory "
            f"(gradient_accumulation_steps={steps}); batch_size stays, batch normalisation works on micro-batches"
        )

    def find(self, steps: int) -> int:
        """The smallest number of micro-batches that fit into the memory of every process.

        Double the number until they fit; where the images cannot be halved, go to the next divisor. On a GPU, try a
        step. On the CPU the system kills a process that takes too much memory, and no exception can be caught. There,
        compare `process_memory` with `machine.available_memory`.

        Raises:
            UserError: in all processes, if even the smallest micro-batches do not fit in one of them.
        """
        found: int | ValueError
        try:
            found = self.share // largest_that_fits(self.share, steps, self._attempt)
        except ValueError as error:  # all processes must end
            found = error
        everyone: list[int | ValueError] = gather_object([found])
        for one in everyone:
            if isinstance(one, ValueError):
                raise one
        return max(one for one in everyone if isinstance(one, int))

    def run(self, size: int) -> float:
        """Seconds of a step without the optimiser, in which one micro-batch of `size` images stands for all."""
        with self._no_trace():
            start = self._now()
            views = self.make_views(self.share)
            made = self._now()
            some = [view[:size] for view in views]
            if size < self.share:
                with torch.no_grad():
                    self._embed(*some)
            self._embed(*some).backward()
            done = self._now()
        return made - start + self.share // size * (done - made)

    def process_memory(self, size: int) -> int:
        """Peak memory of a process on the CPU in bytes, with micro-batches of `size` images.

        A step adds the momentum, the gradients of both views before they are added up, and what autograd saves for
        each image. Measured runs took 0.92 to 1.09 times as much.
        """
        maps = BETWEEN * size * self.image_bytes + self.fixed_bytes
        return round(self.base + self.besides + 2 * self.weights + maps)

    def _saved(self, count: int) -> int:
        """Bytes that autograd saves in a step of `count` images, without weights and statistics."""
        saved: dict[int, int] = {}  # by address: several operations save the same tensor

        def save(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        with self._no_trace():
            views = self.make_views(count)
            with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
                loss = self._embed(*views)
            for tensor in (*self.objective.parameters(), *self.objective.buffers()):
                saved.pop(tensor.untyped_storage().data_ptr(), None)
            loss.backward()
        return sum(saved.values())

    def _attempt(self, size: int) -> None:
        """Raise torch's out-of-memory error if micro-batches of `size` images are too large."""
        if self.device.type == "cpu":
            available = available_memory() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
            further = self.process_memory(size) - _resident()
            if further > available:
                raise torch.OutOfMemoryError(f"CPU out of memory. {further} bytes needed, {available} available")
            return
        besides = torch.empty(self.besides, dtype=torch.uint8, device=self.device)
        try:
            self.run(size)
        finally:
            (besides,) = release_memory(besides)

    def _embed(self, *views: Tensor) -> Tensor:
        with self.accelerator.autocast():
            both = self.objective(*views, return_loss=False)
        return torch.stack([values.float().square().mean() for view in both for values in view.values()]).sum()

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    @contextmanager
    def _no_trace(self) -> Iterator[None]:
        """Training mode; afterwards there is no gradient, and modes, buffers and random numbers are as before."""
        modes = [(part, part.training) for part in self.objective.modules()]
        buffers = [(buffer, buffer.clone()) for buffer in self.objective.buffers()]
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            try:
                self.objective.train()
                yield
            finally:
                self.unreached = [n for n, p in self.objective.named_parameters() if p.requires_grad and p.grad is None]
                self.objective.zero_grad(set_to_none=True)
                with torch.no_grad():
                    for buffer, value in buffers:
                        buffer.copy_(value)
                for part, mode in modes:
                    part.training = mode


def _resident() -> int:
    """Memory of this process in bytes."""
    return psutil.Process().memory_info().rss


def micro_batch_size(share: int, steps: int) -> int:
    """Images of a micro-batch, where a process has `share` images and divides them into `steps` micro-batches.

    Raises:
        UserError: unequal micro-batches, or smaller than two images.
    """
    if share % steps or share // steps < FEWEST_IMAGES:
        raise UserError(
            f"gradient_accumulation_steps={steps} found for {share} images of a process (batch_size over processes); "
            "expected a divisor that leaves two images or more"
        )
    return share // steps


def largest_that_fits(share: int, steps: int, attempt: Callable[[int], None]) -> int:
    """Halve micro-batches until they fit into the memory, and return their images; `share` and `steps` as above.

    `attempt` tries micro-batches of a size in images and raises torch's out-of-memory error.

    Raises:
        UserError: even the smallest ones do not fit, or the images cannot be divided into `steps` equal parts.
    """
    size = micro_batch_size(share, steps)

    def smaller() -> int:
        nonlocal size
        divisors = [n for n in range(FEWEST_IMAGES, size) if share % n == 0]
        if not divisors:
            raise UserError(
                f"batch_size gives {share} images a process, and not even micro-batches of {size} of them fit into the "
                "memory; expected a smaller image_size, backbone or expander_dims"
            )
        size = max((n for n in divisors if 2 * n <= size), default=divisors[0])
        return size

    @find_executable_batch_size(starting_batch_size=size, reduce_batch_size_fn=smaller)
    def fit(batch_size: int) -> int:
        attempt(batch_size)
        return batch_size

    fitting: int = fit()
    return fitting
