"""transformers' own common tests pass on our models, but for what differs by design."""

from __future__ import annotations

import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import pytest
from helpers import ROOT

from common_tests.__main__ import by_design, count

REPORT = """<testsuites><testsuite>
<testcase classname="tests.models.mlvicx.test_mlvicx.EncoderTest" name="test_config"/>
<testcase classname="tests.models.mlvicx.test_mlvicx.EncoderTest" name="test_resize"><skipped/></testcase>
<testcase classname="tests.models.mlvicx.test_mlvicx.EncoderTest" name="test_save"><failure/></testcase>
<testcase classname="tests.models.mlvicx.test_mlvicx.EncoderTest" name="test_load"><error/></testcase>
<testcase classname="tests.models.mlvicx.test_mlvicx.EncoderTest" name="test_can_init_all_missing_weights"><failure/>
</testcase>
<testcase classname="tests.models.mlvicx.test_mlvicx.PretrainingTest" name="test_batching_equivalence"><failure/>
</testcase>
</testsuite></testsuites>"""


def test_failures_are_counted_and_named():
    counts, failed = count(ElementTree.fromstring(REPORT))
    assert counts == {"passed": 1, "skipped": 1, "failed": 2, "failed_by_design": 2}
    assert failed - by_design(failed) == {"EncoderTest.test_save", "EncoderTest.test_load"}


@pytest.mark.thorough
def test_the_common_tests_of_transformers():
    """Fetches the source distribution of transformers, some 11 MB."""
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        [sys.executable, "-m", "common_tests"],
        cwd=ROOT / "tools",
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
