"""Random numbers that depend on their place alone: not on batches, workers or processes, nor on a resume."""

from enum import IntEnum, unique

import numpy as np


@unique
class RandomStream(IntEnum):
    """The independent streams of a run. The figures of every run depend on these numbers."""

    VIEWS = 0
    ORDER = 1
    DISTORTION_1 = 2  # of view 1
    DISTORTION_2 = 3
    TURNS_1 = 4
    TURNS_2 = 5
    LOCAL = 6  # small views
    PARTNERS = 7
    STEP = 8


def stream_generator(seed: int, position: int, stream: RandomStream, sample: int = 0) -> np.random.Generator:
    """Make the random numbers of a place in a run.

    Args:
        seed: of the run.
        position: epoch or step, counted from 0.
        stream: what the numbers are for.
        sample: index in the data set, where every sample has its own numbers.
    """
    return np.random.Generator(np.random.Philox(key=[seed, position], counter=[0, 0, stream, sample]))
