# Copyright 2026 The mlvicx_hf authors. Licensed under the Apache License, Version 2.0.
"""Read a collection of chest radiographs once and write a cache that training reads.

python scripts/prepare_data.py --collection phantom --output caches/phantom
python scripts/prepare_data.py --collection folder --root my_images --output caches/mine
python scripts/prepare_data.py --collection folder --root my_images --output caches/lungs --mask_names lungs
python scripts/prepare_data.py --collection nih14 --root ChestX-ray14 --output caches/nih14
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from pathlib import Path
from typing import Any

from mlvicx_hf.cli import run
from mlvicx_hf.data.collections import Collection, FolderCollection, NIH14Collection, PhantomCollection
from mlvicx_hf.data.phantom import MASKS
from mlvicx_hf.data.prepare import FITS, REJECTED, check_output, prepare


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--collection", required=True, choices=("phantom", "folder", "nih14"))
    parser.add_argument("--output", required=True, type=Path, help="folder of the cache, absent or empty")
    parser.add_argument("--root", type=Path, help="folder of the images (folder, nih14)")
    parser.add_argument(
        "--metadata", type=Path, help="table, from here or from the root (folder: .csv, .jsonl, .parquet)"
    )
    parser.add_argument("--size", type=int, default=256, help="side of the cached images in pixels (default 256)")
    parser.add_argument("--fit", choices=FITS, default="pad", help="what happens to images that are not square")
    parser.add_argument(
        "--splits",
        choices=("auto", "none"),
        default="auto",
        help="auto: the collection's own or 70/10/20; none: all train",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the splits, and of phantoms")
    parser.add_argument("--num_workers", type=int, help="processes (default one a core)")
    parser.add_argument("--max_images", type=int, help="only so many images, for a trial")
    parser.add_argument("--allow_missing", action="store_true", help="go on without listed images that are not there")
    parser.add_argument("--overwrite", action="store_true", help="replace a cache once the new one is complete")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    folder = parser.add_argument_group("folder")
    folder.add_argument("--file_column", help="column of the file (default file_name, file, image or path)")
    folder.add_argument("--patient_column", help="column of the patient (default patient_id)")
    folder.add_argument("--label_columns", help="columns of the labels, joined by commas")
    folder.add_argument("--mask_column", help="column of the mask's file (default mask_file_name)")
    parser.add_argument(
        "--mask_names",
        help="folder: the structure of binary masks, or the classes by pixel value, background first, joined by commas "
        f"(default mask); phantom: one of {', '.join(MASKS)}",
    )
    phantom = parser.add_argument_group("phantom")
    phantom.add_argument("--num_patients", type=int, help="(default 400)")
    phantom.add_argument("--images_per_patient", type=int, help="(default 3)")
    return parser.parse_args()


def make_collection(arguments: argparse.Namespace) -> Collection:
    """The collection that the command line names; options of another one are an error."""
    name = arguments.collection
    options = {
        "folder": ("root", "metadata", "file_column", "patient_column", "label_columns", "mask_column", "mask_names"),
        "nih14": ("root", "metadata"),
        "phantom": ("num_patients", "images_per_patient", "mask_names"),
    }
    given = {key: getattr(arguments, key) for key in sorted(set().union(*options.values()))}
    given = {key: value for key, value in given.items() if value is not None}
    strange = [f"--{key}" for key in given if key not in options[name]]
    if strange:
        raise ValueError(f"{', '.join(strange)} found; --collection {name} does not take it")
    if name == "phantom":
        mask = given.pop("mask_names", None)
        return PhantomCollection(**given, mask=mask, size=arguments.size, seed=arguments.seed)
    if "root" not in given:
        raise ValueError(f"no --root found; --collection {name} expects the folder of its images")
    if name == "nih14":
        return NIH14Collection(**given, seed=arguments.seed)
    for key in {"label_columns", "mask_names"} & given.keys():
        given[key] = [name.strip() for name in given[key].split(",")]
    return FolderCollection(**given)


def print_summary(summary: dict[str, Any], output: Path, seconds: float) -> None:
    """What was found, split by split."""
    images = sum(counts["images"] for counts in summary["splits"].values())
    rate = f"{images / seconds:.0f} images/s"
    print(f"{output}: {images} images of {summary['size']} x {summary['size']} in {seconds:.1f} s ({rate})")
    if summary["synthetic"]:
        print("synthetic radiographs: not of any patient")
    for note in summary["notes"]:
        print(f"note: {note}")
    for split, counts in summary["splits"].items():
        print(f"{split}: {counts['images']} images, {counts['patients']} patients")
        for name in summary["label_names"]:
            known = counts["images"] - counts["unknown"][name]
            share = f"{counts['positives'][name] / known:.1%}" if known else "-"
            unknown = f", {counts['unknown'][name]} unknown" if counts["unknown"][name] else ""
            print(f"    {name}: {counts['positives'][name]} positive of {known} ({share}){unknown}")
        if "masks" in counts:
            found = ", ".join(f"{name} in {number}" for name, number in counts["masks"]["images_with"].items())
            print(f"    masks: {counts['masks']['known']} known of {counts['images']}; {found}")
    print(f"labels: {', '.join(summary['label_names']) or 'none'}{' (one class each)' if summary['exclusive'] else ''}")
    print(f"rejected: {summary['rejected']}{f' (see {output / REJECTED})' if summary['rejected'] else ''}")
    print(f"missing: {summary['missing']}")
    if 10 * summary["rejected"] > images + summary["rejected"]:
        with (output / REJECTED).open(newline="", encoding="utf-8") as file:
            first = next(csv.DictReader(file))
        share = f"{summary['rejected']} of {images + summary['rejected']} images were rejected"
        print(f"warning: {share}, such as {first['file']}: {first['reason']}", file=sys.stderr)


def main() -> None:
    """Prepare a cache."""
    arguments = parse()
    check_output(arguments.output, arguments.overwrite)
    start = time.perf_counter()
    summary = prepare(
        make_collection(arguments),
        arguments.output,
        size=arguments.size,
        fit=arguments.fit,
        splits=arguments.splits,
        seed=arguments.seed,
        allow_missing=arguments.allow_missing,
        max_images=arguments.max_images,
        num_workers=arguments.num_workers,
        overwrite=arguments.overwrite,
        progress=not arguments.quiet,
    )
    print_summary(summary, arguments.output, time.perf_counter() - start)


if __name__ == "__main__":
    run(main)
