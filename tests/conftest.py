import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of real radiographs, from the environment variable MLVICX_REAL_DATA."""
    folder = os.environ.get("MLVICX_REAL_DATA")
    if not folder:
        pytest.skip("MLVICX_REAL_DATA is not set")
    return Path(folder)
