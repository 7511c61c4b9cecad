"""The notebooks run from top to bottom, and are stored without outputs."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import ROOT, environment

nbformat = pytest.importorskip("nbformat", reason='the notebooks need pip install ".[docs]"')
nbclient = pytest.importorskip("nbclient", reason='the notebooks need pip install ".[docs]"')

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def test_there_are_three() -> None:
    assert len(NOTEBOOKS) == 3


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_not_stored(path: Path) -> None:
    for cell in nbformat.read(path, 4).cells:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


@pytest.mark.documents
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment(MPLBACKEND="agg").items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(path, 4)
    client = nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3")
    client.execute(cwd=str(tmp_path))  # raises CellExecutionError
    assert not list(tmp_path.iterdir()), "a notebook writes to its temporary folder alone"
