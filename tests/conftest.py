import os
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

# Threads of torch wait for each other in loops, unless told before it is imported: where several processes share the
# cores, as tests and their scripts do, one of them would wait for whole time slices, and steps take five times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Compiled modules are kept, also where the environment asks for none, as containers do: without them each fresh process
# compiles torch and transformers anew, which takes two thirds of its start.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


@pytest.fixture(scope="session", autouse=True)
def nothing_is_drawn() -> Iterator[None]:
    """Caches and runs get no pictures, which take longer than all else in them; a few tests put the functions back."""
    with (
        mock.patch("mlvicx_hf.data.cache.assembly.write_pictures", return_value=[]),
        mock.patch("mlvicx_hf.pretraining.reporting.plot_curves"),
    ):
        yield


@pytest.fixture
def fresh_accelerate() -> None:
    """Accelerate keeps its state for the whole process."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of real radiographs, from the environment variable MLVICX_REAL_DATA."""
    folder = os.environ.get("MLVICX_REAL_DATA")
    if not folder:
        pytest.skip("MLVICX_REAL_DATA is not set")
    return Path(folder)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put files with slow tests first, so that no process is left with one of them at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
