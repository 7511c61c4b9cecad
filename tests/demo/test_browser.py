"""The page in a real Chromium, as people use it: mouse, drop, keyboard, phone, dark, two at once, and bad files."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import environment, make_cache

pytest.importorskip("gradio", reason="gradio of the extra demo is not installed")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright of the extra dev is not installed")

from mlvicx_hf.prediction.indexing import build_index  # noqa: E402

pytestmark = pytest.mark.thorough
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SECRET = "Zwetschgenmann^Ottokar"
SECONDS = 60_000  # milliseconds for anything


def dicom(pixels: bytes, rows: int, columns: int) -> bytes:
    """A DICOM file full of a patient's name."""
    pydicom = pytest.importorskip("pydicom")
    data = pydicom.Dataset()
    data.file_meta = pydicom.dataset.FileMetaDataset()
    data.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = "1.2.840.10008.5.1.4.1.1.1"
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = "1.2.3.4"
    data.Modality, data.PhotometricInterpretation = "DX", "MONOCHROME2"
    data.PatientName = data.PatientID = data.StudyDescription = data.InstitutionName = data.ImageComments = SECRET
    data.Rows, data.Columns, data.SamplesPerPixel = rows, columns, 1
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 8, 8, 7, 0
    data.PixelData = pixels
    buffer = io.BytesIO()
    data.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def bomb() -> bytes:
    """A PNG file that says it has 30,000 × 30,000 pixels."""
    head = (30_000).to_bytes(4, "big") * 2 + bytes([8, 0, 0, 0, 0])

    def chunk(kind: bytes, content: bytes) -> bytes:
        return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


def packed(content: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.png", content)
    return buffer.getvalue()


class Served:
    """The command `mlvicx demo` in a process of its own, with a temporary folder of its own."""

    def __init__(self, folder: Path, *words: object) -> None:
        self.temporary = folder / "tmp"
        self.temporary.mkdir()
        self.log = ""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mlvicx_hf.commands", "demo", *map(str, words), "--port", "0"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment(TMPDIR=str(self.temporary), PYTHONUNBUFFERED="1"),
        )
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.log += line
            if found := re.search(r"the page is at (http://127\.0\.0\.1:\d+/)", line):
                self.address = found[1]
                break
        else:
            raise AssertionError(self.log)
        self.reader = threading.Thread(target=self._read)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.log += line

    def end(self) -> None:
        self.process.terminate()
        self.process.wait(60)
        self.reader.join()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, classifier: Path, segmenter: Path) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    splits = ["train"] * 8 + ["validation"] * 4 + ["test"] * 2
    rows: list[dict[str, Any]] = [
        {"patient_id": f"p{i}", "split": split, "_draw": {"disc": i % 2 == 0}, "disc": int(i % 2 == 0)}
        for i, split in enumerate(splits)
    ]
    cache = make_cache(folder, rows, size=48)
    build_index(str(classifier), cache, folder / "index", progress=False)
    model = shutil.copytree(classifier, folder / "model")
    weights = json.loads((folder / "index" / "index.json").read_text())["weights_sha256"]
    score = {"pointing": {"mean": 0.04, "low": 0.0, "high": 0.1, "chance": 0.09}}
    about = {
        "findings": {"Edema": {"located": 43, "scores": {"m": score}}},
        "models": {"m": {"weights_sha256": weights, "level": 4}},
        "data": {"split": "test"},
        "settings": {"tolerance": 0},
    }
    (model / "explanations.json").write_text(json.dumps(about))
    started = Served(folder, "--model", model, "--segmenter", segmenter, "--index", folder / "index")
    yield started
    started.end()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


def open_page(browser: Any, served: Served, **options: Any) -> Any:
    """A new visitor. Requests to other servers and errors of the page are kept in `page.faults`."""
    page = browser.new_context(viewport={"width": 1280, "height": 900}, **options).new_page()
    page.set_default_timeout(SECONDS)
    page.faults = []
    own = (served.address, served.address.replace("http", "ws"), "data:", "blob:")
    page.on("request", lambda request: None if request.url.startswith(own) else page.faults.append(request.url))
    page.on("pageerror", lambda error: page.faults.append(str(error)))
    page.goto(served.address)
    page.wait_for_selector("#radiograph")
    return page


def give(page: Any, content: bytes, name: str = "a.png") -> None:
    page.set_input_files("#radiograph", {"name": name, "mimeType": "application/octet-stream", "buffer": content})


def picture(page: Any) -> str:
    source = page.locator(".radiograph img").get_attribute("src")
    assert isinstance(source, str)
    return source


def wait_for_another_picture(page: Any, before: str) -> None:
    page.wait_for_function("before => document.querySelector('.radiograph img').src !== before", arg=before)


def wait_for_problem(page: Any, text: str) -> None:
    page.wait_for_function("text => document.querySelector('.problem').textContent.includes(text)", arg=text)


def save(page: Any, name: str) -> None:
    """Keep a picture of the page to look at, in the folder that MLVICX_SCREENSHOTS names."""
    if folder := os.environ.get("MLVICX_SCREENSHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=Path(folder, f"{name}.png"), full_page=True)


def test_a_radiograph_from_drop_to_neighbours(browser: Any, served: Served, radiograph: bytes):
    page = open_page(browser, served)
    transfer = page.evaluate_handle(
        """bytes => { const data = new DataTransfer();
        data.items.add(new File([new Uint8Array(bytes)], "Zwetschgenmann.png")); return data; }""",
        list(radiograph),
    )
    page.dispatch_event(".drop", "drop", {"dataTransfer": transfer})
    page.wait_for_selector(".radiograph img")
    assert "Research use only. Not a medical device" in page.locator(".notice").inner_text()
    rows = page.locator(".findings tbody tr")
    assert rows.count() == 3
    shown = [float(rows.nth(i).locator("td").first.inner_text().partition("%")[0]) for i in range(3)]
    assert shown == sorted(shown, reverse=True)
    assert page.get_by_text("Mass <b>left</b>", exact=True).count() >= 1
    assert page.locator(".similar li").count() == 5
    assert page.locator(".similar img").count() == 5

    before = picture(page)
    page.get_by_role("radio", name="Edema").check()
    page.get_by_text("points at the finding in 4% of 43 test images (chance 9%)").wait_for()
    wait_for_another_picture(page, before)
    before = picture(page)
    page.get_by_label("Grey level shown as white").first.fill("120")
    wait_for_another_picture(page, before)
    before = picture(page)
    page.get_by_label("Show outlines").uncheck()
    wait_for_another_picture(page, before)
    save(page, "desktop_light")
    page.get_by_role("button", name="Show a synthetic radiograph").click()
    wait_for_another_picture(page, before)
    assert not page.faults


def test_files_of_all_kinds(browser: Any, served: Served, radiograph: bytes, deep_radiograph: bytes):
    page = open_page(browser, served)
    give(page, radiograph)
    page.wait_for_selector(".radiograph img")
    for content in (deep_radiograph, dicom(bytes(range(256)) * 12, 48, 64)):
        before = picture(page)
        give(page, content, f"{SECRET}.dcm")
        wait_for_another_picture(page, before)
        assert SECRET not in page.content()
    bad = {
        "content is none of": b"some text",
        "damaged": radiograph[:-300],
        "suspiciously large": bomb(),
        "empty file": b"",
    }
    for reason, content in bad.items():
        give(page, content)
        wait_for_problem(page, reason)
        save(page, "bad_file")
    for content in (b"<svg><script>alert(1)</script></svg>", b"<html><script>alert(1)</script>", packed(radiograph)):
        give(page, radiograph)
        page.wait_for_function("() => document.querySelector('.problem').textContent === ''")
        give(page, content, "../../etc/a.png")
        wait_for_problem(page, "content is none of")
    assert not page.faults


def test_the_keyboard_alone_is_enough(browser: Any, served: Served, radiograph: bytes):
    page = open_page(browser, served)
    page.keyboard.press("Tab")
    order = []
    for _ in range(4):
        order.append(page.evaluate("() => document.activeElement.id || document.activeElement.textContent.trim()"))
        page.keyboard.press("Tab")
    assert order.index("radiograph") < order.index("Show a synthetic radiograph")
    page.get_by_role("button", name="Show a synthetic radiograph").focus()
    page.keyboard.press("Enter")
    page.wait_for_selector(".radiograph img")
    before = picture(page)
    page.get_by_role("radio", name="no heat map").focus()
    page.keyboard.press("Tab")
    page.keyboard.press("Space")
    page.get_by_text(re.compile("Heat map: |Nobody has measured")).wait_for()
    before = picture(page)
    page.locator("input[type=range]").nth(1).focus()
    page.keyboard.press("ArrowLeft")
    wait_for_another_picture(page, before)
    assert not page.faults


CONTRAST = """() => {
  const numbers = text => text.match(/[\\d.]+/g).map(Number);
  const light = c => { const [r, g, b] = c.slice(0, 3).map(v => { v /= 255;
    return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; }); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const behind = e => { for (; e; e = e.parentElement) { const c = numbers(getComputedStyle(e).backgroundColor);
    if (c.length < 4 || c[3] > 0.99) return c; } return [255, 255, 255]; };
  return [...document.querySelectorAll(`h1, h2, button, label span, .notice, .drop strong, .drop span, .problem,
      .findings th, .findings td, .warning, .similar div`)]
    .filter(e => e.textContent.trim() && e.getClientRects().length)
    .map(e => { const [a, b] = [light(numbers(getComputedStyle(e).color)), light(behind(e))];
      return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), e.textContent.trim().slice(0, 40)]; })
    .filter(([ratio]) => ratio < 4.5); }"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("form", "width"), [("desktop", 1280), ("phone", 390)])
def test_it_can_be_read_on_any_screen(
    browser: Any, served: Served, radiograph: bytes, scheme: str, form: str, width: int
):
    page = open_page(browser, served, color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 844})
    give(page, b"no image")
    wait_for_problem(page, "cannot be read")
    give(page, radiograph)
    page.wait_for_selector(".radiograph img")
    page.wait_for_function("() => document.querySelector('.problem').textContent === ''")
    save(page, f"{form}_{scheme}")
    assert page.evaluate(CONTRAST) == []
    ends = "e => e.getBoundingClientRect().right"
    for part in (".findings", ".similar", ".radiograph img", ".notice", "#radiograph"):
        assert page.locator(part).first.evaluate(ends) <= width, part
    assert not page.faults


def test_two_people_see_their_own(browser: Any, served: Served, radiograph: bytes, deep_radiograph: bytes):
    first, second = open_page(browser, served), open_page(browser, served)
    give(first, radiograph)
    give(second, deep_radiograph)
    for page in (first, second):
        page.wait_for_selector(".radiograph img")
    assert picture(first) != picture(second)
    before = picture(second)
    first.get_by_role("radio", name="Edema").check()
    first.get_by_text("points at the finding").wait_for()
    assert picture(second) == before
    assert not first.faults + second.faults


def test_nothing_of_a_file_stays(browser: Any, served: Served):
    page = open_page(browser, served)
    content = dicom(os.urandom(64 * 48), 48, 64)
    give(page, content, f"{SECRET}.dcm")
    page.wait_for_selector(".radiograph img")
    time.sleep(1)
    folders = [served.temporary, Path(tempfile.gettempdir(), "gradio")]
    marks = (SECRET.encode(), content[-600:-500])
    for file in (file for folder in folders if folder.exists() for file in folder.rglob("*") if file.is_file()):
        assert not any(mark in file.read_bytes() for mark in marks), file
    assert SECRET not in served.log
    assert served.log.strip().count("\n") <= 3, served.log
