"""Files that a folder holds: the content decides what an image is, and what is skipped is counted and named."""

import io
import json
import os
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from data.dicom_files import dicom
from PIL import Image

from mlvicx_hf.common.errors import UserError
from mlvicx_hf.data.collections.folder import FolderCollection
from mlvicx_hf.data.collections.hf import HFCollection
from mlvicx_hf.prediction.prediction import find_inputs


def picture(kind: str, number: int = 0) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (16, 16), np.uint8)
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def write(file: Path, content: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)


FILM = dicom(np.arange(256, dtype=np.uint8).reshape(16, 16))
ODD = {
    "IM0": FILM,
    "a.12345": FILM,
    "b.ima": FILM,
    "p": picture("PNG"),
    "j.img": picture("JPEG"),
    "t.1": picture("TIFF"),
}
ODD |= {"w.pic": picture("WEBP"), "m.dat": picture("BMP"), "k.xyz": picture("JPEG2000")}


def found(root: Path) -> tuple[list[str], list[str]]:
    """The images that `prepare` and `predict` find, which are the same, and the notes of `prepare`."""
    listing = FolderCollection(root).read()
    names = [record.name for record in listing.records]
    assert [image.path.relative_to(root).as_posix() for image in find_inputs([root])] == names
    return names, listing.notes


def test_the_content_decides_whatever_the_name(tmp_path: Path):
    for name, content in ODD.items():
        write(tmp_path / "PAT" / name, content)
    write(tmp_path / "c.dcm", FILM)
    names, _ = found(tmp_path)
    assert set(names) == {f"PAT/{name}" for name in ODD} | {"c.dcm"}


def test_what_is_skipped_is_counted_and_named(tmp_path: Path):
    for name in ("a.png", ".hidden/b.png", "cache/c.png"):
        write(tmp_path / name, picture("PNG"))
    for name in ("notes.txt", "more.txt", "cache/cache.json", "films.zip", "empty"):
        write(tmp_path / name, b"" if name == "empty" else b"PK text")
    write(tmp_path / "DICOMDIR", bytes(128) + b"DICM")
    names, notes = found(tmp_path)
    assert names == ["a.png"]
    (note,) = [note for note in notes if note.startswith("skipped files that are no images: 7")]
    for part in ("hidden 1", ".txt 2", ".zip 1", "prepared cache 1", "no suffix 2"):
        assert part in note


def test_links_to_folders_are_followed_inside_the_root_and_named_outside(tmp_path: Path):
    root = tmp_path / "root"
    write(root / "a" / "a.png", picture("PNG"))
    write(root / ".store" / "b.png", picture("PNG", 1))
    write(tmp_path / "outside" / "c.png", picture("PNG", 2))
    (root / "twice").symlink_to(root / "a")
    (root / "stored").symlink_to(root / ".store")
    (root / "loop").symlink_to(root)
    (root / "away").symlink_to(tmp_path / "outside")
    names, notes = found(root)
    assert names == ["a/a.png", "stored/b.png"]
    assert any("link to a folder outside 1" in note for note in notes)


def test_a_folder_that_cannot_be_listed_is_no_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for ward in ("ward1", "ward2"):
        write(tmp_path / ward / "a.dcm", FILM)
    look = os.scandir

    def scandir(folder: str) -> Any:  # as root, no folder is closed
        if str(folder).endswith("ward2"):
            raise PermissionError(13, "Permission denied", folder)
        return look(folder)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(PermissionError, match="ward2"):
        FolderCollection(tmp_path).read()


def test_unlisted_images_are_counted(tmp_path: Path):
    for number in range(3):
        write(tmp_path / f"a{number}.png", picture("PNG", number))
    (tmp_path / "metadata.csv").write_text("file_name,patient_id\n./a0.png,p0\n")
    notes = FolderCollection(tmp_path).read().notes
    assert any("metadata.csv does not list, left out: 2, such as a1.png" in note for note in notes)


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_csv_of_spreadsheets(tmp_path: Path, separator: str):
    for number in range(2):
        write(tmp_path / f"a{number}.png", picture("PNG", number))
    rows = [
        ("file_name", "patient_id", "Edema"),
        ("a0.png", "p0", "1"),
        ("a1.png", "p1", "0"),
        ("", "", ""),
        ("", "", ""),
    ]
    (tmp_path / "metadata.csv").write_text("\n".join(separator.join(row) for row in rows))
    listing = FolderCollection(tmp_path).read()
    assert [(record.patient_id, record.labels) for record in listing.records] == [("p0", (1,)), ("p1", (0,))]


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"])
def test_json_lines_end_at_line_feeds_alone(tmp_path: Path, mark: str):
    write(tmp_path / "a0.png", picture("PNG"))
    row = {"file_name": "a0.png", "patient_id": "p", "Edema": 1, "report": f"one{mark}two"}
    text = json.dumps(row, ensure_ascii=ord(mark) < 32)
    (tmp_path / "metadata.jsonl").write_text(text + "\r\n\n", encoding="utf-8", newline="")
    assert FolderCollection(tmp_path).read().label_names == ("Edema",)


@pytest.mark.parametrize("streaming", [False, True])
def test_columns_of_bytes_and_path_are_images(tmp_path: Path, streaming: bool):
    cells = [{"bytes": picture("PNG", number), "path": f"{number}.png"} for number in range(2)]
    table = pyarrow.table({"scan": cells, "patient_id": ["1", "2"], "label": [0, 1]})
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    listing = HFCollection(tmp_path / "x.parquet", streaming=streaming).read()
    contents = list(listing.contents(0)) if streaming else [record.load() for record in listing.records]
    assert contents == [cell["bytes"] for cell in cells]
    assert listing.label_names == ("0", "1")


def test_absolute_paths_below_the_root_are_read_and_others_refused(tmp_path: Path):
    root = tmp_path / "root"
    write(root / "a0.png", picture("PNG"))
    (root / "metadata.csv").write_text(f"file_name\n{root / 'a0.png'}\n")
    assert [record.name for record in FolderCollection(root).read().records] == ["a0.png"]
    for name in (tmp_path / "b.png", root / ".." / "b.png"):
        (root / "metadata.csv").write_text(f"file_name\n{name}\n")
        with pytest.raises(UserError, match="expected a path below the root"):
            FolderCollection(root).read()


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_folders_and_files_may_have_umlauts_of_two_forms(tmp_path: Path, form: str):
    root = tmp_path / unicodedata.normalize("NFC", "Röntgen")
    name = "Thorax_für/Müller.png"
    folder, file = (
        unicodedata.normalize(kind, part) for kind, part in zip(("NFC", "NFD"), name.split("/"), strict=True)
    )
    write(root / folder / file, picture("PNG"))
    listed = unicodedata.normalize(form, name)
    write(root / "metadata.csv", f"file_name,patient_id\n{listed},1\n".encode())
    listing = FolderCollection(root).read()
    assert [record.path for record in listing.records] == [root / folder / file]
    assert not [note for note in listing.notes if "does not list" in note]


def test_one_file_listed_in_two_forms_is_listed_twice(tmp_path: Path):
    names = [unicodedata.normalize(form, "Müller.png") for form in ("NFC", "NFD")]
    write(tmp_path / names[0], picture("PNG"))
    rows = "".join(f"{name},{number}\n" for number, name in enumerate(names))
    write(tmp_path / "metadata.csv", f"file_name,patient_id\n{rows}".encode())
    with pytest.raises(UserError, match="1 found in more than one row"):
        FolderCollection(tmp_path).read()
    write(tmp_path / names[1], picture("PNG", 1))  # now there are two files
    assert len(FolderCollection(tmp_path).read().records) == 2
