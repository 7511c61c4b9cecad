"""The page without a browser: what it sends, what it refuses, and what it leaves on the disk."""

from __future__ import annotations

import base64
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from helpers import assert_users_error, mlvicx

pytest.importorskip("gradio", reason="gradio of the extra demo is not installed")

from mlvicx_hf.common.errors import MissingExtraError, UserError
from mlvicx_hf.demo.page import NO_MAP, Page, draw_picture, serving
from mlvicx_hf.demo.reading import JudgedFinding, Neighbour, RadiographReading, Reader

MASS = "Mass <b>left</b>"


@pytest.fixture(scope="module")
def reader(classifier: Path, segmenter: Path) -> Reader:
    return Reader(str(classifier), str(segmenter))


@pytest.fixture(scope="module")
def server(reader: Reader) -> Iterator[str]:
    with serving(reader, "127.0.0.1", 0) as (_, where):
        yield where


def give(page: Page, content: bytes) -> list[Any]:
    event: Any = SimpleNamespace(content=base64.b64encode(content).decode())
    return page.read(0, 255, True, event)


def test_a_reading_is_shown_with_names_as_text(reader: Reader, radiograph: bytes):
    page = Page(reader)
    problem, read, results, judged, choice, pointing, similar, picture = give(page, radiograph)
    assert (problem, pointing, similar) == ("", "", "")
    assert isinstance(read, RadiographReading)
    assert results.visible
    assert [name for name, _ in choice.choices] == [NO_MAP, *(finding.name for finding in read.findings)]
    assert "Mass &lt;b&gt;left&lt;/b&gt;" in judged
    assert MASS not in judged
    assert picture.startswith('<img src="data:image/png;base64,')
    picture, pointing = page.show(read, MASS, 0, 255, 0.5, True)
    assert 'alt="Radiograph, heat map of Mass &lt;b&gt;left&lt;/b&gt;, outlines of lungs"' in picture
    assert "Nobody has measured" in pointing


@pytest.mark.parametrize("content", ["not base64!", None, {"a": 1}])
def test_content_that_arrives_damaged_is_named(reader: Reader, content: Any):
    event: Any = SimpleNamespace(content=content)
    problem, read, *_ = Page(reader).read(0, 255, True, event)
    assert problem == "This file cannot be read: it arrived damaged."
    assert read is None


def test_a_bad_file_gives_a_sentence_and_hides_the_last_one(reader: Reader):
    problem, read, results, *_ = give(Page(reader), b"<script>alert(1)</script>")
    assert problem.startswith("This file cannot be read: content is none of PNG")
    assert "<script>" not in problem
    assert read is None
    assert not results.visible


def test_a_file_that_needs_another_package_names_it(reader: Reader, monkeypatch: pytest.MonkeyPatch):
    def decode(*_: Any) -> Any:
        raise MissingExtraError("DICOM needs pydicom")

    monkeypatch.setattr("mlvicx_hf.demo.reading.decode_gray", decode)
    assert give(Page(reader), b"film")[0] == "This file cannot be read: DICOM needs pydicom."


def test_a_synthetic_radiograph_is_read(reader: Reader):
    _, read, *_ = Page(reader).draw(0, 255, True)
    assert read.gray.shape == (512, 512)


def test_warning_neighbours_and_bands_are_shown(reader: Reader):
    found = [
        JudgedFinding("Edema", 0.5, 0.25, (0.4, 0.6), "unsure", "points at the finding in 4% of 43 images (chance 9%)")
    ]
    near = [Neighbour(7, 0.987, "Edema, <i>x</i>", None)]
    read = RadiographReading(
        np.zeros((4, 4), np.uint8), Any, found, "unsure", {}, near, "no texture", True, {"Edema": np.zeros((4, 4))}
    )
    judged, _, pointing, similar = Page(reader)._present(read, 0, 255, True)[3:7]
    assert "Unlike anything seen" in judged
    assert "Look at this picture first: no texture." in judged
    assert "Answer: <strong>unsure</strong>" in judged
    assert "<td>50.0%<br>threshold 25.0%</td><td>unsure<br>unsure from 40.0% to 60.0%</td>" in judged
    assert "image 7, cosine 0.987" in similar
    assert "&lt;i&gt;" in similar
    assert pointing == ""
    _, pointing = Page(reader).show(read, "Edema", 0, 255, 1, True)
    assert (
        pointing
        == "<p>Heat map: points at the finding in 4% of 43 images (chance 9%). This one is zero everywhere.</p>"
    )


def test_the_window_and_the_overlay(reader: Reader):
    gray = np.array([[0, 100, 200, 255]], np.uint8)
    border = np.array([[False, False, False, True]])
    read = RadiographReading(gray, Any, [], "", {"lungs": border}, [], "", None)
    window = np.asarray(draw_picture(read, 100, 200, None, 0, False))
    assert window.tolist() == [[[0, 0, 0], [0, 0, 0], [255, 255, 255], [255, 255, 255]]]
    heat = np.array([[0.0, 0.0, 1.0, 0.0]])
    shown = np.asarray(draw_picture(read, 0, 255, heat, 1, True)).tolist()[0]
    assert shown[:2] == [[0, 0, 0], [100, 100, 100]]
    assert shown[2] == [122, 4, 3]  # the last colour of turbo
    assert shown[3] == [255, 0, 255]
    assert np.asarray(draw_picture(read, 255, 0, None, 0, False)).max() <= 255


# -- over HTTP ---------------------------------------------------------------------------------------------------------


def test_the_page_asks_no_other_server(server: str):
    with urllib.request.urlopen(server, timeout=60) as answer:
        text = answer.read().decode()
    assert "Research use only" in text
    assert "fonts.googleapis" not in text


def test_gradios_own_upload_is_closed(server: str):
    boundary = "x"
    part = f'--{boundary}\r\nContent-Disposition: form-data; name="files"; filename="../../a.html"\r\n\r\n'
    body = part.encode() + b"<html>" * 10 + f"\r\n--{boundary}--\r\n".encode()
    head = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
    request = urllib.request.Request(f"{server}gradio_api/upload", body, head)
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(request, timeout=60)
    assert error.value.code == 413


def test_files_of_this_machine_are_not_served(server: str, classifier: Path):
    for path in ("/etc/passwd", str(classifier / "config.json")):
        with pytest.raises(urllib.error.HTTPError) as error:
            urllib.request.urlopen(f"{server}gradio_api/file={path}", timeout=60)
        assert error.value.code in (403, 404)


def test_no_event_is_an_open_interface(server: str):
    with urllib.request.urlopen(f"{server}gradio_api/info", timeout=60) as answer:
        assert b"read" not in answer.read()


def test_a_port_that_is_taken_is_named(reader: Reader, server: str):
    port = int(server.rstrip("/").rpartition(":")[2])
    with (
        pytest.raises(UserError, match=f"--port {port} found; expected a free address of this machine: .*in use"),
        serving(reader, "127.0.0.1", port),
    ):
        pass


@pytest.mark.parametrize(("host", "port"), [("127.0.0.1", 70000), ("127.0.0.1", -1), ("203.0.113.1", 0)])
def test_an_address_that_cannot_be_is_named(reader: Reader, host: str, port: int):
    with pytest.raises(UserError, match=f"--host {host} --port {port} found"), serving(reader, host, port):
        pass


def test_the_folder_for_uploads_goes(reader: Reader):
    before = set(Path(tempfile.gettempdir()).glob("mlvicx-demo-*"))
    with serving(reader, "127.0.0.1", 0):
        assert set(Path(tempfile.gettempdir()).glob("mlvicx-demo-*")) - before
    assert set(Path(tempfile.gettempdir()).glob("mlvicx-demo-*")) <= before


def test_a_model_that_is_no_classifier_ends_the_command(segmenter: Path):
    assert_users_error(mlvicx("demo", "--model", segmenter), "expected a MLVICXForImageClassification")
