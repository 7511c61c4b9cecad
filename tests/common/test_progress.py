"""What progress bars write where there is no terminal."""

from __future__ import annotations

import pytest

from mlvicx_hf.common.progress import progress_bar


def test_a_bar_inside_another_is_plain_lines_when_piped(capsys: pytest.CaptureFixture[str]):
    with progress_bar(2, "suite", "cell") as outer:
        for _ in range(2):
            with progress_bar(3, "training", "epoch") as inner:
                inner.update(3)
            outer.update()
    lines = capsys.readouterr().err.splitlines()
    assert all(line.isprintable() and line.strip() for line in lines)  # no bare line, nothing that moves a cursor
    assert any(line.startswith("training: 100%") for line in lines)
    assert any(line.startswith("suite: 100%") for line in lines)
