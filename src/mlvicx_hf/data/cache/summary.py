"""Summarise a cache for people: counts, a histogram, a contact sheet and a dataset card."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import DatasetCard, DatasetCardData
from PIL import Image

from mlvicx_hf.common.text import markdown_table

from ..images.pictures import contact_sheet
from ..masks import foreground

CARD = "README.md"
CONTACT_SHEET = "contact_sheet.png"
HISTOGRAM = "histogram.png"
SAMPLE = 512  # images that the histogram counts
SHEET = (8, 6)  # images in a row, rows
TILE = 128  # side of an image on the sheet, in pixels
TITLE = 22  # characters of a file's path on the sheet, its last ones: scanners give many files one name


def column(part: Any, name: str) -> list[Any]:
    """Read a whole column of a data set."""
    values: list[Any] = part[name][:]
    return values


def count_split(
    part: Any, masks: Sequence[Mapping[str, Any] | None], label_names: Sequence[str], mask_names: Sequence[str]
) -> dict[str, Any]:
    """Count images, patients, views, sexes, labels and masks of a split.

    `masks` has hash and values of the mask of each row, or None if it is unknown.
    """
    labels = np.array(column(part, "labels"), dtype=float).reshape(len(part), len(label_names))
    counts = {
        "images": len(part),
        "patients": len(set(column(part, "patient_id"))),
        "views": dict(sorted(Counter(column(part, "view")).items())),
        "sexes": dict(sorted(Counter(sex or "unknown" for sex in column(part, "sex")).items())),
        "positives": dict(zip(label_names, (labels == 1).sum(axis=0).tolist(), strict=True)),
        "unknown": dict(zip(label_names, np.isnan(labels).sum(axis=0).tolist(), strict=True)),
    }
    if mask_names:
        known = [mask for mask in masks if mask is not None]
        images_with = {
            name: sum(value in mask["values"] for mask in known) for name, value in foreground(mask_names).items()
        }
        counts["masks"] = {"known": len(known), "images_with": images_with}
    if "boxes" in part.features:
        boxes = column(part, "boxes")
        counts["boxes"] = {
            "known": sum(found is not None for found in boxes),
            "boxes": sum(len(found or ()) for found in boxes),
        }
    return counts


def original_sizes(parts: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """Compute the smallest, median and largest width and height of the original images."""
    sizes = {}
    for name in ("width", "height"):
        values = np.concatenate([np.array(column(part, name)) for part in parts.values()])
        sizes[name] = {"min": int(values.min()), "median": int(np.median(values)), "max": int(values.max())}
    return sizes


def write_pictures(folder: Path, parts: Mapping[str, Any]) -> list[str]:
    """Write `contact_sheet.png` and, if matplotlib is installed, `histogram.png`. Return notes for the user."""
    places = [(split, row) for split, part in parts.items() for row in range(len(part))]
    shown = _spread(places, SHEET[0] * SHEET[1])
    titles = [f"{split}\n{parts[split][row]['source'].partition(':')[2][-TITLE:]}" for split, row in shown]
    contact_sheet([_tile(parts[split][row]) for split, row in shown], SHEET[0], titles).save(folder / CONTACT_SHEET)
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return [f'no {HISTOGRAM}: it needs matplotlib, pip install ".[report]" in the repository']
    figure = Figure(figsize=(8, 3), layout="constrained")
    grays, sides = figure.subplots(1, 2)
    counts = np.zeros(256)
    for split, row in _spread(places, SAMPLE):
        counts += parts[split][row]["image"].histogram()
    grays.stairs(counts / counts.sum(), np.arange(257) - 0.5, fill=True)
    grays.set(xlabel="grey level", ylabel="share of pixels", yscale="log")
    shorter = [np.minimum(column(part, "width"), column(part, "height")) for part in parts.values()]
    sides.hist(shorter, bins=40, stacked=True, label=list(parts))
    sides.set(xlabel="shorter side of the original, pixels", ylabel="images")
    sides.legend(frameon=False)
    figure.savefig(folder / HISTOGRAM, dpi=100, metadata={"Software": None})
    return []


def _spread(places: list[tuple[str, int]], count: int) -> list[tuple[str, int]]:
    """Choose `count` places, evenly spread over all."""
    return [places[index] for index in np.unique(np.linspace(0, len(places) - 1, count).round().astype(int))]


def _tile(row: Mapping[str, Any]) -> np.ndarray:
    """Draw an image for the sheet, with the outline of its mask."""
    tile = np.array(row["image"].resize((TILE, TILE), Image.Resampling.BILINEAR))
    if row.get("mask") is not None:
        mask = np.asarray(row["mask"].resize((TILE, TILE), Image.Resampling.NEAREST))
        edge = np.zeros(mask.shape, bool)
        edge[1:] |= mask[1:] != mask[:-1]
        edge[:, 1:] |= mask[:, 1:] != mask[:, :-1]
        tile[edge] = 255
    return tile


def write_card(folder: Path, manifest: Mapping[str, Any], notes: Sequence[str]) -> None:
    """Write the dataset card, `README.md`, which also tells the Hub where the splits are."""
    tasks = ["image-classification"] if manifest["label_names"] else []
    tasks += ["image-segmentation"] if manifest.get("mask_names") else []
    data = DatasetCardData(
        license="unknown",
        task_categories=tasks or ["image-feature-extraction"],
        tags=["chest-x-ray", "radiology", "mlvicx", *(["synthetic"] if manifest["synthetic"] else [])],
        pretty_name=f"{manifest['collection']}, {manifest['size']} px",
        configs=[
            {
                "config_name": "default",
                "data_files": [{"split": split, "path": f"{split}/*.arrow"} for split in manifest["splits"]],
            }
        ],
    )
    text = f"---\n{data}\n---\n\n{_card_text(manifest, notes)}"
    DatasetCard(text).save(folder / CARD)


def _card_text(manifest: Mapping[str, Any], notes: Sequence[str]) -> str:
    splits = manifest["splits"]
    total = sum(counts["images"] for counts in splits.values())
    kind = "Synthetic radiographs" if manifest["synthetic"] else "Chest radiographs"
    policy = "".join(f", {name}: {value}" for name, value in manifest["policy"].items())
    sizes = (
        f"{name} {found['min']} to {found['max']}, median {found['median']}"
        for name, found in manifest["original_sizes"].items()
    )
    lines = [
        f"# {manifest['collection']}, prepared for mlvicx_hf",
        "",
        f"{kind} of the collection `{manifest['collection']}`{policy}: {total} images, 8-bit grey, "
        f"{manifest['size']} × {manifest['size']} pixels ({manifest['fit']}), by mlvicx_hf {manifest['version']} "
        f"(commit {manifest['commit']}).",
        "",
        "**Research use only. Not a medical device. The licence and terms of the original collection hold for these "
        "images as well: read them before you share this data set.**",
        "",
        markdown_table(["", *splits], _rows(manifest)),
        "",
        f"Original sizes: {', '.join(sizes)} pixels.",
        "Labels: 1 present, 0 absent, NaN unknown; names in `cache.json`. `sha256` is the original file's.",
        f"Split hash `{manifest['split_hash']}` (SHA-256 of `splits.csv`), data hash `{manifest['data_hash']}`.",
        f"Rejected: {manifest['rejected']} (`rejected.csv`). Missing: {manifest['missing']}. Copies: "
        f"{manifest['duplicates']['identical']} identical, {manifest['duplicates']['near']} nearly identical, "
        f"{manifest['duplicates']['dropped']} left out (`duplicates.csv`). Grey scale replaced: {manifest['noted']}; "
        f"without contrast or texture: {manifest['flat']} (`notes.csv`).",
        "",
        *(f"- {note}" for note in notes),
        "",
        "```python",
        "from huggingface_hub import snapshot_download",
        "from mlvicx_hf.data.cache.cache import load_cache",
        "",
        'folder = snapshot_download("org/name", repo_type="dataset")  # or your folder',
        'images = load_cache(folder).datasets["train"]',
        "```",
    ]
    return "\n".join(lines) + "\n"


def _rows(manifest: Mapping[str, Any]) -> list[list[str]]:
    """Make the cells of the card's table: one row per fact, one column per split."""
    splits = manifest["splits"].values()
    patients = "patients" if manifest["patients_known"] else "patients (each image counts as one)"
    rows = [["images", *(str(counts["images"]) for counts in splits)]]
    rows.append([patients, *(str(counts["patients"]) for counts in splits)])
    for fact, singular in (("views", "view"), ("sexes", "sex")):
        for value in sorted({value for counts in splits for value in counts[fact]}):
            rows.append([f"{singular} {value}", *(str(counts[fact].get(value, 0)) for counts in splits)])
    for name in manifest["label_names"]:
        cells = (f"{counts['positives'][name]} of {counts['images'] - counts['unknown'][name]}" for counts in splits)
        rows.append([name, *cells])
    for name in foreground(manifest.get("mask_names", ())):
        cells = (f"{counts['masks']['images_with'][name]} of {counts['masks']['known']}" for counts in splits)
        rows.append([f"mask {name}", *cells])
    if all("boxes" in counts for counts in splits):
        rows.append(["boxes", *(f"{c['boxes']['boxes']} on {c['boxes']['known']} images" for c in splits)])
    return rows
