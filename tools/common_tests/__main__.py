"""Run transformers' own common tests, unedited, on our models, and count what passes.

    cd tools
    python -m common_tests                # downloads the source distribution of the installed version, some 11 MB
    python -m common_tests --source transformers-5.24.0.tar.gz -k gradient

The distribution carries `test_modeling_common`, `test_backbone_common`, `test_image_processing_common` and
`test_configuration_common`, but not the exporters' and the generation tests that they import: those are left out. The
exit code is 0 if nothing fails but what differs by design (see docs/reference/models.md).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

HERE = Path(__file__).parent
# Modules that the distribution lacks, with what the common tests import from them.
ABSENT = {
    "tests/exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "tests/generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "tests/utils/test_configuration_utils.py": "config_common_kwargs = "
    + repr(
        {"return_dict": False, "output_hidden_states": True, "dtype": "float16", "chunk_size_feed_forward": 5}
        | {"architectures": ["AModel"], "id2label": {0: "label"}, "label2id": {"label": "0"}}
    ),
    "utils/fetch_hub_objects_for_ci.py": "def url_to_local_path(url):\n    return url\n",
}
# Tests that fail by design, as "Class.test" or "test" of every class, with the reason.
BY_DESIGN = {
    "test_can_init_all_missing_weights": "timm draws the backbone of a new model, with other random numbers than "
    "transformers' seeds; the rules are the same, and a test of ours compares them (transformers excepts timm, too)",
    "PretrainingTest.test_batching_equivalence": "the loss is one of the whole batch: a single row has none",
}


def main() -> None:
    """Fetch, lay out, run, count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, help="the source distribution, a .tar.gz; by default it is downloaded")
    parser.add_argument("-k", default="", help="only these tests, as pytest takes it")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = run(lay_out(arguments.source, Path(folder)), arguments.k)
    counts, failed = count(report)
    print(json.dumps(counts | {"failed": sorted(failed)}, indent=2))
    raise SystemExit(bool(failed - by_design(failed)))


def lay_out(source: Path | None, folder: Path) -> Path:
    """Make a folder in which the common tests run: theirs, ours, and what neither has."""
    version = importlib.metadata.version("transformers")
    packages = folder / "packages"
    install("install", "--target", str(packages), "parameterized")
    if source is None:
        options = ("--no-deps", "--no-binary", ":all:", "--no-build-isolation")
        install("download", *options, "--dest", str(folder), f"transformers=={version}")
        source = next(folder.glob("transformers-*.tar.gz"))
    with tarfile.open(source) as archive:
        archive.extractall(folder, [m for m in archive if "/tests/" in m.name], filter="data")
    root = next(folder.glob("transformers-*/tests")).parent
    for name, content in ABSENT.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    ours = root / "tests" / "models" / "mlvicx"
    ours.mkdir(parents=True)
    shutil.copy(HERE / "test_mlvicx.py", ours)
    for place in (
        root / "tests",
        *(root / "tests" / name for name in ("exporters", "generation", "utils", "models")),
        ours,
    ):
        (place / "__init__.py").touch()
    return root


def install(*words: str) -> None:
    """Run pip; CalledProcessError if it fails."""
    subprocess.run([sys.executable, "-m", "pip", "--quiet", *words], check=True)


def run(root: Path, chosen: str) -> ElementTree.Element:
    """Run our test file there, and return pytest's report."""
    paths = [str(root), str(root.parent / "packages"), str(HERE.parents[1] / "src")]
    more = {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1", "RUN_SLOW": "0"}
    words = ["-q", "-p", "no:cacheprovider", "-W", "ignore", "--junitxml", "report.xml", "-k", chosen, "--rootdir", "."]
    subprocess.run(
        [sys.executable, "-m", "pytest", *words, "tests/models/mlvicx"], cwd=root, env=os.environ | more, check=False
    )
    return ElementTree.parse(root / "report.xml").getroot()


def count(report: ElementTree.Element) -> tuple[dict[str, int], set[str]]:
    """Count outcomes, and name what failed as "Class.test"."""
    counts: Counter[str] = Counter()
    failed = set()
    for case in report.iter("testcase"):
        outcome = next((child.tag for child in case if child.tag in ("failure", "error", "skipped")), "passed")
        counts["failed" if outcome in ("failure", "error") else outcome] += 1
        if outcome in ("failure", "error"):
            failed.add(f"{case.attrib['classname'].rsplit('.', 1)[-1]}.{case.attrib['name']}")
    counts["failed_by_design"] = len(by_design(failed))
    counts["failed"] -= counts["failed_by_design"]
    return dict(counts), failed


def by_design(failed: set[str]) -> set[str]:
    """Those of the failures that have a reason."""
    return {name for name in failed if name in BY_DESIGN or name.split(".")[1] in BY_DESIGN}


if __name__ == "__main__":
    main()
