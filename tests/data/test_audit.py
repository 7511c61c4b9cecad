import hashlib
import io
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from mlvicx_hf.data.cache.cache import FORMAT, MANIFEST, Cache, cache_features, load_cache
from mlvicx_hf.data.copies.audit import Part, audit_caches, compare, copies_of_parts, report
from mlvicx_hf.data.copies.duplicates import perceptual_hash
from mlvicx_hf.data.synthetic.phantom import draw_phantom

SIZE = 64


@cache
def png(patient: int, film: int = 0) -> bytes:
    return save(Image.fromarray(draw_phantom(patient, film, size=96).image), "PNG")


def save(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def jpeg(content: bytes) -> bytes:
    return save(Image.open(io.BytesIO(content)), "JPEG", quality=70)


def resized(content: bytes) -> bytes:
    return save(Image.open(io.BytesIO(content)).resize((70, 70)), "PNG")


def row(split: str, patient: str, name: str, content: bytes, **more: Any) -> dict[str, Any]:
    return {"split": split, "patient_id": patient, "source": f"nih14:{name}", "content": content} | more


def clean(first: int = 0, patients: int = 10) -> list[dict[str, Any]]:
    """Two films of each patient, 6/2/2 patients of 10."""
    return [
        row(
            ("train", "train", "train", "validation", "test")[patient % 5],
            f"p{patient}",
            f"{patient}-{film}.png",
            png(patient, film),
            view=("PA", "AP")[film],
            labels=[float(patient % 2), (1.0, 0.0, float("nan"))[patient % 3]],
        )
        for patient in range(first, first + patients)
        for film in range(2)
    ]


def write_cache(folder: Path, rows: Sequence[dict[str, Any]], **manifest: Any) -> Cache:
    """A cache as `prepare` writes it, which would refuse some of these."""
    columns: dict[str, list[dict[str, Any]]] = {}
    for number, values in enumerate(rows):
        square = Image.open(io.BytesIO(values["content"])).convert("L").resize((SIZE, SIZE), Image.Resampling.BILINEAR)
        found = {
            "image": {"bytes": save(square, "PNG"), "path": None},
            "sha256": hashlib.sha256(values["content"]).hexdigest(),
            "phash": perceptual_hash(square),
            "view": values.get("view", "UNKNOWN"),
            "labels": values.get("labels", [0.0, float("nan")]),
            "patient_id": values["patient_id"],
            "source": values["source"],
            "sex": "",
            "age": float("nan"),
            "width": number,
            "height": number,
        }
        columns.setdefault(values["split"], []).append(found)
    features = cache_features()
    parts = {split: datasets.Dataset.from_list(found, features=features) for split, found in columns.items()}
    datasets.disable_progress_bars()
    datasets.DatasetDict(parts).save_to_disk(folder)
    content = {
        "format": FORMAT,
        "collection": "nih14",
        "label_names": ["Edema", "Mass"],
        "exclusive": False,
        "patients_known": True,
        "patient_source": "nih14",
        "size": SIZE,
        "fit": "pad",
        "splits": {split: {"images": len(part)} for split, part in parts.items()},
    }
    (folder / MANIFEST).write_text(json.dumps(content | manifest))
    return load_cache(folder, check=False)


def found(result: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    """What pairs of splits share, by the names of both."""
    named = {}
    for pair in result["pairs"]:
        names = tuple(f"{Path(pair[side]['cache']).name} {pair[side]['split']}" for side in ("one", "other"))
        named[names] = {kind: pair[kind]["count"] for kind in ("patients", "identical", "near")} | {
            "leaks": pair["leaks"]
        }
    return named


NOTHING = {"patients": 0, "identical": 0, "near": 0, "leaks": []}


def test_a_clean_cache_has_no_leak(tmp_path: Path):
    result = audit_caches([write_cache(tmp_path / "a", clean())])
    assert found(result) == {
        ("a train", "a validation"): NOTHING,
        ("a train", "a test"): NOTHING,
        ("a validation", "a test"): NOTHING,
    }
    assert result["leaks"] == []
    assert all(part["identical"]["count"] == part["near"]["count"] == 0 for part in result["splits"])
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert report(result).splitlines()[-1] == "no leak found"
    assert "LEAK" not in report(result)


PLANTED = {
    "patient": (row("test", "p0", "new.png", png(77)), "patients"),
    "identical": (row("test", "q", "renamed.png", png(0)), "identical"),
    "jpeg": (row("test", "q", "again.jpg", jpeg(png(0))), "near"),
    "resized": (row("test", "q", "small.png", resized(png(0))), "near"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_leak_is_found(tmp_path: Path, name: str):
    planted, kind = PLANTED[name]
    result = audit_caches([write_cache(tmp_path / "a", [*clean(), planted])])
    assert found(result)["a train", "a test"] == NOTHING | {kind: 1, "leaks": [kind]}
    assert found(result)["a train", "a validation"] == found(result)["a validation", "a test"] == NOTHING
    assert len(result["leaks"]) == 1
    lines = report(result).splitlines()
    assert lines[-1] == "1 leak(s)"
    assert lines[-2].startswith("LEAK: 1 ")
    assert f"{tmp_path}/a train and {tmp_path}/a test" in lines[-2]
    assert ("patient p0" if kind == "patients" else f"nih14:0-0.png = {planted['source']}") in lines[-2]


@pytest.mark.parametrize("name", PLANTED)
def test_a_leak_into_another_cache_is_found(tmp_path: Path, name: str):
    planted, kind = PLANTED[name]
    one = write_cache(tmp_path / "one", clean())
    other = write_cache(tmp_path / "other", [*clean(first=20), planted])
    result = audit_caches([one, other])
    shared = found(result)
    assert shared.pop(("one train", "other test")) == NOTHING | {kind: 1, "leaks": [kind]}
    assert list(shared.values()) == [NOTHING] * 14
    assert len(result["leaks"]) == 1


@pytest.mark.parametrize("name", PLANTED)
@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_only_training_on_what_is_tested_elsewhere_is_a_leak(tmp_path: Path, name: str, split: str):
    planted, kind = PLANTED[name]
    caches = [
        write_cache(tmp_path / "other", [planted | {"split": split}]),
        write_cache(tmp_path / "one", [line | {"split": "train"} for line in clean()]),
        write_cache(tmp_path / "held", [line | {"split": "validation"} for line in clean()]),
    ]
    shared = found(audit_caches(caches))
    leaks = [kind]
    assert shared[f"other {split}", "one train"] == NOTHING | {kind: 1, "leaks": leaks if split != "train" else []}
    assert shared[f"other {split}", "held validation"] == NOTHING | {
        kind: 1,
        "leaks": leaks if split == "train" else [],
    }
    everything = {"patients": 10, "identical": 20, "near": 0, "leaks": ["patients", "identical"]}
    assert shared["one train", "held validation"] == everything


def test_copies_inside_a_split_are_reported_and_no_leak(tmp_path: Path):
    more = [row("train", "p0", "twin.png", png(0)), row("train", "p1", "again.jpg", jpeg(png(1, 1)))]
    result = audit_caches([write_cache(tmp_path / "a", [*clean(), *more])])
    assert result["leaks"] == []
    train, validation, test = result["splits"]
    assert train["identical"] == {"count": 2, "examples": [["nih14:0-0.png", "nih14:twin.png"]]}
    assert train["near"]["count"] == 2
    assert train["near"]["examples"][0][:2] == ["nih14:1-1.png", "nih14:again.jpg"]
    assert {part["near"]["count"] + part["identical"]["count"] for part in (validation, test)} == {0}


def test_labels_views_and_patients_are_counted(tmp_path: Path):
    result = audit_caches([write_cache(tmp_path / "a", clean())])
    train = result["caches"][0]["splits"]["train"]
    assert (train["images"], train["patients"], train["views"]) == (12, 6, {"AP": 6, "PA": 6})
    # patients 0, 1, 2, 5, 6, 7 are in train, two films each
    assert train["labels"] == {
        "Edema": {"positive": 6, "known": 12, "unknown": 0},
        "Mass": {"positive": 4, "known": 8, "unknown": 4},
    }
    lines = [" ".join(line.split()) for line in report(result).splitlines()]
    assert f"{tmp_path}/a: nih14, 64 px, pad" in lines
    assert "images 12 4 4" in lines
    assert "patients 6 2 2" in lines
    assert "Mass 4 of 8 (50.0%), 4 unknown 2 of 2 (100.0%), 2 unknown 2 of 4 (50.0%)" in lines


@pytest.mark.parametrize(
    ("one", "other", "reason"),
    [
        ({"patient_source": "rsna"}, {}, "patients are numbered by rsna here, by nih14 there"),
        ({"patients_known": False}, {}, "one are not known"),
        ({}, {"patients_known": False}, "other are not known"),
        ({"patient_source": "folder"}, {"patient_source": "folder"}, "two collections of kind folder number"),
    ],
)
def test_patients_that_cannot_be_compared_are_not(tmp_path: Path, one: dict, other: dict, reason: str):
    caches = [write_cache(tmp_path / "one", clean(), **one), write_cache(tmp_path / "other", clean(first=20), **other)]
    result = audit_caches(caches)
    pair = next(pair for pair in result["pairs"] if pair["one"]["cache"] != pair["other"]["cache"])
    assert pair["patients"]["count"] is None
    assert reason in pair["patients"]["reason"]
    assert "- patients not comparable: " in report(result)
    assert reason in report(result)
    assert result["leaks"] == []


def test_patients_of_one_name_who_may_be_the_same_are_counted(tmp_path: Path):
    folder = {"patient_source": "folder"}
    rows = [line | {"content": png(100 + n)} for n, line in enumerate(clean())]
    caches = [write_cache(tmp_path / "one", clean(), **folder), write_cache(tmp_path / "other", rows, **folder)]
    result = audit_caches(caches)
    assert result["leaks"] == []
    pair = next(pair for pair in result["pairs"] if pair["one"]["cache"] != pair["other"]["cache"])
    assert (pair["patients"]["count"], pair["patients"]["alike"]) == (None, 6)
    assert "UNSURE" not in report(result)  # train and train


def test_patients_of_one_name_are_the_same_if_the_user_says_so(tmp_path: Path):
    folder = {"patient_source": "folder"}
    train = [line | {"split": "train", "content": png(100 + n)} for n, line in enumerate(clean())]
    caches = [write_cache(tmp_path / "one", train, **folder), write_cache(tmp_path / "other", clean(), **folder)]
    result = audit_caches(caches)
    assert result["leaks"] == []
    lines = [line for line in report(result).splitlines() if line.startswith("UNSURE: ")]
    assert any("patients have the same name in" in line and line.endswith("(--same_ids)?") for line in lines)
    result = audit_caches(caches, same_ids=True)
    assert any("shared patient(s) in" in leak for leak in result["leaks"])
    assert "UNSURE" not in report(result)


def test_squares_made_in_different_ways_are_noted(tmp_path: Path):
    caches = [write_cache(tmp_path / "a", clean()), write_cache(tmp_path / "b", clean(first=20), fit="squash")]
    assert len(audit_caches(caches[:1])["notes"]) == 1
    assert "note: squares made by pad and squash" in report(audit_caches(caches))


def test_caches_and_distances_that_do_not_fit_are_errors(tmp_path: Path):
    one = write_cache(tmp_path / "a", clean(patients=5))
    with pytest.raises(ValueError, match="caches none found; expected at least one"):
        audit_caches([])
    with pytest.raises(ValueError, match=r"a, .*a found; expected at least one, and each once"):
        audit_caches([one, one])
    for near in (-1, 128):
        with pytest.raises(ValueError, match=f"near={near} found; expected bits from 0 to 127"):
            audit_caches([one], near=near)


def test_examples_are_limited(tmp_path: Path):
    leaking = [*clean(), *(line | {"split": "test", "source": f"nih14:x{n}"} for n, line in enumerate(clean()))]
    result = audit_caches([write_cache(tmp_path / "a", leaking)])
    pair = next(
        pair for pair in result["pairs"] if pair["one"]["split"] == "train" and pair["other"]["split"] == "test"
    )
    assert (pair["patients"]["count"], pair["identical"]["count"]) == (6, 12)
    assert len(pair["patients"]["examples"]) == len(pair["identical"]["examples"]) == 5


# -- on columns alone --------------------------------------------------------------------------------------------------


def part(cache: str, split: str, patients: Sequence[int], contents: Sequence[bytes], **more: Any) -> Part:
    squares = [Image.open(io.BytesIO(content)).convert("L") for content in contents]
    return Part(
        cache,
        split,
        patients=[f"p{patient}" for patient in patients],
        sources=[f"{cache}:{split}:{number}" for number in range(len(contents))],
        sha256=[hashlib.sha256(content).hexdigest() for content in contents],
        phash=[perceptual_hash(square) for square in squares],
        square=squares.__getitem__,
        numbered_by="nih14",
        **more,
    )


def test_many_copies_of_one_file_cost_one_comparison():
    asked = []
    one = part("a", "train", range(300), [png(0)] * 300)
    one = Part(**{**vars(one), "square": lambda row: asked.append(row) or Image.open(io.BytesIO(png(0)))})
    two = part("a", "test", range(300, 302), [png(0), jpeg(png(0))])
    result = compare([one, two])
    pair = result["pairs"][0]
    assert pair["identical"]["count"] == 300
    assert pair["identical"]["images"] == [300, 1]
    assert pair["near"]["images"] == [300, 1]
    assert pair["near"]["examples"][0][:2] == ["a:train:0", "a:test:1"]
    assert len(asked) <= 3  # to compare it, and to see that it is not flat
    assert copies_of_parts([one]) == {}  # identical files are no near ones


def test_a_file_whose_squares_differ_is_identical_and_not_near():
    one = part("a", "train", [1], [png(0)])
    small = Image.open(io.BytesIO(png(0))).resize((40, 40))
    two = part("b", "test", [2], [save(small, "PNG")])
    two = Part(**{**vars(two), "sha256": one.sha256})
    assert one.phash != two.phash
    pair = compare([one, two])["pairs"][0]
    assert (pair["identical"]["count"], pair["near"]["count"]) == (1, 0)


def test_the_distance_decides_what_is_looked_at():
    one, two = part("a", "train", [1], [png(0)]), part("a", "test", [2], [jpeg(png(0))])
    distance = compare([one, two])["pairs"][0]["near"]["examples"][0][2]
    assert distance > 0
    assert compare([one, two], near=distance)["leaks"] != []
    assert compare([one, two], near=distance - 1)["leaks"] == []


def test_blank_images_are_no_copies_of_each_other():
    blank = [save(Image.new("L", (size, size)), "PNG") for size in (60, 64)]
    one, two = part("a", "train", [1], blank[:1]), part("a", "test", [2], blank[1:])
    assert one.phash == two.phash
    assert compare([one, two])["leaks"] == []


def test_two_films_of_forty_patients_are_no_copies():
    contents = [png(patient, film) for patient in range(40) for film in range(2)]
    pixels = np.array([np.asarray(Image.open(io.BytesIO(content))) for content in contents])
    assert len(np.unique(pixels, axis=0)) == 80
    assert copies_of_parts([part("a", "train", range(80), contents)], near=127) == {}
