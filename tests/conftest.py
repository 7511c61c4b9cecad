import os
from pathlib import Path

import pytest

# Threads of torch wait for each other in loops, unless told before it is imported: where several processes share the
# cores, as tests and their scripts do, one of them would wait for whole time slices, and steps take five times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of real radiographs, from the environment variable MLVICX_REAL_DATA."""
    folder = os.environ.get("MLVICX_REAL_DATA")
    if not folder:
        pytest.skip("MLVICX_REAL_DATA is not set")
    return Path(folder)
