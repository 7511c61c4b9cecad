"""The example in docs/develop/add_a_collection.md of a collection of one's own works as it stands there."""

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mlvicx_hf.data.cache.cache import load_cache
from mlvicx_hf.data.cache.prepare import prepare
from mlvicx_hf.data.collections import KINDS

DOCS = Path(__file__).parents[3] / "docs"


def test_the_documented_class_is_a_collection(tmp_path: Path):
    page = (DOCS / "develop" / "add_a_collection.md").read_text()
    (code,) = re.findall(r"```python\n(.*?class .*?)```", page, re.DOTALL)
    names: dict[str, Any] = {"__name__": "mlvicx_hf.data.collections.mine", "__package__": "mlvicx_hf.data.collections"}
    exec(code, names)
    assert len(code.splitlines()) < 40
    for number in range(3):
        Image.fromarray(np.full((9, 9), 50 * number, np.uint8)).save(tmp_path / f"{number}.png")
    (tmp_path / "labels.csv").write_text(
        "image,patient,Edema,Mass\n0.png,p0,1,0\n1.png,p1,0,1\n2.png,p2,,\nabsent.png,p3,1,0\n"
    )
    summary = prepare(
        names["MyCollection"](tmp_path), tmp_path / "cache", size=8, splits="none", allow_missing=True, progress=False
    )
    assert (summary["missing"], summary["collection"]) == (1, "mine")
    labels = [row["labels"][0] for row in load_cache(tmp_path / "cache").datasets["train"]]
    assert labels[:2] == [1, 0]
    assert math.isnan(labels[2])


def test_every_collection_is_documented():
    page = (DOCS / "guides" / "prepare.md").read_text()
    table = page[page.index("## Released collections") :]
    rows = re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)
    assert set(rows[: len(KINDS)]) == KINDS.keys()
