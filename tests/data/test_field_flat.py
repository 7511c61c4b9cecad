"""Films that a wrong grey scale made white: listed, and never taken for copies of one another."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from data.dicom_files import dicom
from helpers import mlvicx
from PIL import Image

from mlvicx_hf.data.cache.cache import load_cache
from mlvicx_hf.data.cache.prepare import prepare
from mlvicx_hf.data.collections.folder import FolderCollection
from mlvicx_hf.data.copies.audit import audit_caches
from mlvicx_hf.data.copies.duplicates import is_flat
from mlvicx_hf.data.images.pixels import fit_square_gray
from mlvicx_hf.data.synthetic.phantom import draw_phantom

SIDE = 64


def chest(patient: int) -> np.ndarray:
    return draw_phantom(patient, 0, size=SIDE).image


def square(pixels: np.ndarray) -> Image.Image:
    return fit_square_gray(Image.fromarray(pixels.astype(np.uint8)), SIDE)


def collimated(value: int) -> np.ndarray:
    film = np.zeros((300, 300))
    film[40:260, 30:270] = value
    return film


FLAT = {
    "white": np.full((300, 300), 255),
    "black": np.zeros((300, 300)),
    "padded": np.full((300, 200), 250),
    "collimated": collimated(255),
    "one marker": np.where(np.arange(300)[:, None] + np.arange(300) < 60, 0, 255),
    "gradient": np.tile(np.linspace(0, 255, 300), (300, 1)),
    "quiet noise": 100 + np.random.default_rng(0).normal(0, 1, (300, 300)),
    "three grey levels": chest(0) // 100 + 100,
}


@pytest.mark.parametrize("kind", FLAT)
def test_flat_images_are_known(kind: str):
    assert is_flat(square(FLAT[kind]))


@pytest.mark.parametrize("patient", range(4))
def test_a_chest_is_not_flat_even_where_it_is_dark_or_narrow(patient: int):
    film = chest(patient)
    assert not is_flat(square(film))
    assert not is_flat(square(film // 3))
    assert not is_flat(square(film[:, 12:52]))


def write(root: Path, films: list[bytes]) -> Path:
    root.mkdir()
    for number, content in enumerate(films):
        (root / f"im{number}.dcm").write_bytes(content)
    rows = [f"im{number}.dcm,p{number},{number % 2}" for number in range(len(films))]
    (root / "metadata.csv").write_text("\n".join(["file_name,patient_id,Edema", *rows]))
    return root


def notes(cache: Path) -> list[dict[str, str]]:
    with (cache / "notes.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_films_with_the_window_of_another_device_keep_their_patients_and_are_noted(tmp_path: Path):
    window = {"WindowCenter": 40, "WindowWidth": 400, "BitsStored": 12}
    films = [dicom(chest(number).astype(np.uint16) * 8 + 2000, **window) for number in range(6)]
    options = ("--size", SIDE, "--splits", "none", "--num_workers", 0, "--quiet", "--drop_duplicates", "near")
    root, cache = write(tmp_path / "films", films), tmp_path / "cache"
    done = mlvicx("prepare", "--collection", "folder", "--root", root, "--output", cache, *options)
    assert done.returncode == 0, done.stderr
    summary = json.loads((cache / "cache.json").read_text())
    assert summary["splits"]["train"]["patients"] == 6
    assert (summary["noted"], summary["flat"], summary["duplicates"]["near"]) == (6, 0, 0)
    assert [row["file"] for row in notes(cache)] == [f"im{number}.dcm" for number in range(6)]
    assert all("window" in row["note"].lower() for row in notes(cache))
    assert "noted: 6 grey scales, 0 flat images" in done.stdout
    assert "images whose grey scale does not fit their pixels: 6, such as im0.dcm" in done.stdout


def test_flat_images_are_no_copies_even_where_their_files_are_equal(tmp_path: Path):
    root, cache = tmp_path / "films", tmp_path / "cache"
    root.mkdir()
    films = {"a": FLAT["white"], "b": FLAT["white"], "c": FLAT["padded"], "d": chest(0), "e": chest(0), "f": chest(1)}
    for name, film in films.items():
        Image.fromarray(film.astype(np.uint8)).save(root / f"{name}.png")
    table = ["file_name,patient_id,split"]
    table += [f"{name}.png,p{name},{'test' if name == 'b' else 'train'}" for name in films]
    (root / "metadata.csv").write_text("\n".join(table))
    options = {"size": SIDE, "num_workers": 0, "progress": False}
    summary = prepare(FolderCollection(root), cache, drop_duplicates="near", **options)
    assert (summary["flat"], summary["duplicates"]["identical"], summary["duplicates"]["dropped"]) == (3, 1, 1)
    assert [row["file"] for row in notes(cache)] == ["a.png", "b.png", "c.png"]
    assert any("without contrast or texture: 3, such as a.png" in note for note in summary["notes"])
    audit = audit_caches([load_cache(cache)])
    assert audit["leaks"] == []
    assert [split["identical"]["count"] for split in audit["splits"]] == [0, 0]
    without = prepare(FolderCollection(root), cache, drop_flat=True, overwrite=True, **options)
    assert {split: counts["images"] for split, counts in without["splits"].items()} == {"train": 3}
    assert (without["flat"], without["rejected"], without["duplicates"]["dropped"]) == (3, 3, 0)
    assert "a.png,no contrast or texture" in (cache / "rejected.csv").read_text()
