from pathlib import Path

import pytest
from helpers import unlabelled_cache
from runs import pretrain


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """44 images: five steps of eight an epoch, and four that wait."""
    return unlabelled_cache(tmp_path_factory.mktemp("pretraining"), 44)


@pytest.fixture(scope="session")
def finished(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of ten steps, never interrupted, with checkpoints 2 to 10. Copy it before you change it."""
    output = tmp_path_factory.mktemp("runs") / "finished"
    return pretrain(cache, output, "--checkpoint_steps", 1, "--save_total_limit", 9)
