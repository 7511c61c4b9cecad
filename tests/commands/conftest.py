from collections.abc import Iterator

import pytest

from kills import Forks


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    """Starts commands in a moment, as processes that can be killed."""
    with Forks(without=("matplotlib",)) as forks:  # which takes longer than the runs
        yield forks
