"""`mlvicx publish --space` over the wire, and the Space started as it is."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path

import pytest
import yaml
from helpers import assert_users_error, environment, mlvicx, mlvicx_elsewhere, run_code
from loopback_hub import LoopbackHub

gradio = pytest.importorskip("gradio", reason="gradio of the extra demo is not installed")

NAME = "org/radiographs"
FETCH = """
import sys
from huggingface_hub import snapshot_download

snapshot_download("org/radiographs", repo_type="space", local_dir=sys.argv[1])
"""


@pytest.mark.thorough
def test_a_space_is_published_and_starts_as_it_is(classifier: Path, segmenter: Path, tmp_path: Path):
    words = ["publish", "--model", classifier, "--space", "--segmenter", segmenter, "--repo_id", NAME, "--private"]
    with LoopbackHub(token="hf_secret") as hub:
        variables = hub.environment(tmp_path / "home")
        (done,) = mlvicx_elsewhere(words, **variables)
        assert done.returncode == 0, done.stderr
        assert re.search(r"\d+ files, .* published as org/radiographs at [0-9a-f]{40}", done.stdout)
        assert hub.repositories[f"spaces/{NAME}"].private
        fetched = run_code(FETCH, tmp_path / "space", **variables)
        assert fetched.returncode == 0, fetched.stderr
        assert not hub.unexpected
    space = tmp_path / "space"
    _, head, text = (space / "README.md").read_text().split("---\n", 2)
    metadata = yaml.safe_load(head)
    assert metadata["sdk"] == "gradio"
    assert metadata["sdk_version"] == gradio.__version__
    assert metadata["app_file"] == "app.py"
    assert len(metadata["short_description"]) <= 60
    assert "Not a medical device" in text
    needed = {re.split("[<>=]", line)[0] for line in (space / "requirements.txt").read_text().splitlines()}
    assert {"torch", "transformers", "gradio", "pydicom", "captum"} <= needed
    assert not {"mlvicx-hf", "pytest", "faiss-cpu"} & needed
    assert not list(space.rglob("__pycache__"))
    assert {
        "mlvicx_hf/commands/demo.py",
        "mlvicx_hf/demo/page.py",
        "model/model.safetensors",
        "segmenter/model.safetensors",
        "app.py",
    } <= {file.relative_to(space).as_posix() for file in space.rglob("*")}
    process = subprocess.Popen(
        [sys.executable, "app.py"],
        cwd=space,
        env=environment(GRADIO_SERVER_PORT="0", PYTHONUNBUFFERED="1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    guard = threading.Timer(200, process.kill)
    guard.start()
    try:
        assert process.stdout is not None
        log = ""
        for line in process.stdout:
            log += line
            if found := re.search(r"the page is at http://\S+:(\d+)/", line):
                break
        else:
            raise AssertionError(log)
        with urllib.request.urlopen(f"http://127.0.0.1:{found[1]}/config", timeout=60) as answer:
            assert "Show outlines" in json.dumps(json.load(answer))
    finally:
        guard.cancel()
        process.kill()
        process.communicate()


def test_a_dry_run_sends_nothing(classifier: Path):
    done = mlvicx("publish", "--model", classifier, "--space", "--repo_id", NAME, "--dry_run")
    assert done.returncode == 0, done.stderr
    assert "app.py" in done.stdout
    assert "model/model.safetensors" in done.stdout
    assert "would go to org/radiographs (public, main); nothing was sent" in done.stdout


def test_what_is_no_space_is_refused(classifier: Path, segmenter: Path):
    wrong = mlvicx("publish", "--model", segmenter, "--space", "--repo_id", NAME, "--dry_run")
    assert_users_error(
        wrong, "MLVICXForSemanticSegmentation found; expected a MLVICXForImageClassification as the model"
    )
    card = mlvicx("publish", "--model", classifier, "--space", "--repo_id", NAME, "--with_expanders")
    assert_users_error(card, "--with_expanders found; --space does not take it")
    outlines = mlvicx("publish", "--model", classifier, "--segmenter", segmenter, "--repo_id", NAME)
    assert_users_error(outlines, "--segmenter found; --model does not take it")
    data = mlvicx("publish", "--dataset", "caches/x", "--space", "--repo_id", NAME)
    assert_users_error(data, "--space found; --dataset does not take it")
