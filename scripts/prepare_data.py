# Copyright 2026 The mlvicx_hf authors. Licensed under the Apache License, Version 2.0.
"""Read a collection of chest radiographs once and write a cache that training reads.

python scripts/prepare_data.py --collection folder --root my_images --output caches/mine
python scripts/prepare_data.py --collection folder --root my_images --output caches/lungs --mask_names lungs
python scripts/prepare_data.py --collection nih14 --root ChestX-ray14 --output caches/nih14
python scripts/prepare_data.py --collection hf --root org/radiographs --streaming --output caches/hub
python scripts/prepare_data.py --collection phantom --output caches/phantom

A run that was killed goes on where it was when the same command is given again.
"""

from __future__ import annotations

import argparse
import csv
import inspect
import sys
import time
from pathlib import Path
from typing import Any

from mlvicx_hf.common.errors import run
from mlvicx_hf.data.cache.assembly import REJECTED
from mlvicx_hf.data.cache.cache import DUPLICATES
from mlvicx_hf.data.cache.prepare import FITS, check_output, prepare
from mlvicx_hf.data.collections import KINDS, Collection
from mlvicx_hf.data.collections.tables import UNCERTAIN
from mlvicx_hf.data.copies.deduplication import DROPS
from mlvicx_hf.data.synthetic.phantom import MASKS

# Options of a collection that its constructor calls otherwise, because `prepare` has options of these names.
PARAMETERS = {
    "hf": {"root": "path", "config_name": "name", "split_names": "splits"},
    "phantom": {"mask_names": "mask"},
}
LISTS = ("label_columns", "mask_names")  # joined by commas


def parse() -> argparse.Namespace:
    """Command line: options of `prepare`, and below `collection_options` those of the collections that were given."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--collection", required=True, choices=KINDS)
    add("--output", required=True, type=Path, help="folder of the cache, absent or empty")
    add("--size", type=int, default=256, help="side of the cached images in pixels (default 256)")
    add("--fit", choices=FITS, default="pad", help="what happens to images that are not square")
    add(
        "--splits",
        default="auto",
        help="auto: the collection's own or 70/10/20; none: all train; else a CSV file such as another cache's "
        "splits.csv",
    )
    add("--seed", type=int, default=0, help="of the splits, and of phantoms")
    add("--drop_duplicates", choices=DROPS, default="none", help="leave out copies of an image (default none)")
    add("--num_workers", type=int, help="processes (default one a core)")
    add("--max_images", type=int, help="only so many images, for a trial")
    add("--allow_missing", action="store_true", help="go on without listed images that are not there")
    add("--overwrite", action="store_true", help="replace a cache once the new one is complete")
    add("--quiet", action="store_true", help="no progress bar")
    common = {action.dest for action in parser._actions}
    group = parser.add_argument_group("collections", "each takes some of these; one that it does not take is an error")
    add = group.add_argument
    add("--root", help="folder of the images (hf: name on the Hub, folder, parquet or Arrow files)")
    add("--metadata", type=Path, help="folder, nih14: table, from here or from the root (.csv, .jsonl, .parquet)")
    add("--file_column", help="folder: column of the file (default file_name, file, image or path)")
    add("--image_column", help="hf: column of the image (default the only one)")
    add("--patient_column", help="folder, hf: column of the patient (default patient_id)")
    add("--label_columns", help="folder, hf: columns of the labels, joined by commas")
    add("--mask_column", help="folder, hf: column of the mask (folder: default mask_file_name)")
    add(
        "--mask_names",
        help="folder, hf: the structure of binary masks, or the classes by pixel value, background first, joined by "
        f"commas (default mask); phantom: one of {', '.join(MASKS)}",
    )
    add("--uncertain", choices=UNCERTAIN, help="folder, hf, chexpert, mimic_cxr_jpg: what a label of -1 means")
    add("--config_name", help="hf: configuration, where there are several")
    add("--revision", help="hf: branch, tag or commit on the Hub")
    add("--streaming", action="store_true", default=None, help="hf: read in order, without downloading all of it")
    add("--split_names", help="hf: splits to read and what they are, such as images_2020=train,images_2021=test")
    add("--readers", choices=("any", "majority"), help="vinbigdata, vindr: how many must see a finding (default any)")
    add("--classes", choices=("target", "detailed"), help="rsna: one label, or three classes (default target)")
    add("--mapping", help="rsna: the challenge's mapping to NIH's files, which tells the patients")
    add("--headers", help="rsna: table of the DICOM headers, which tells view, sex and age")
    add("--masks", choices=("table", "files"), help="siim: of the run lengths, or PNG files (default table)")
    add("--num_patients", type=int, help="phantom: (default 400)")
    add("--images_per_patient", type=int, help="phantom: (default 3)")
    arguments = parser.parse_args()
    given = {key: value for key, value in vars(arguments).items() if key not in common and value is not None}
    arguments.collection_options = given
    return arguments


def make_collection(arguments: argparse.Namespace) -> Collection:
    """The collection that the command line names; options that its constructor does not take are an error."""
    name, given = arguments.collection, dict(arguments.collection_options)
    kind = KINDS[name]
    parameters = inspect.signature(kind).parameters
    renamed = PARAMETERS.get(name, {})
    hidden = set(renamed.values())  # one constructor's `splits` is not the option --splits
    strange = [f"--{key}" for key in given if key not in renamed and (key not in parameters or key in hidden)]
    if strange:
        raise ValueError(f"{', '.join(strange)} found; --collection {name} does not take it")
    for key in LISTS:
        if key in given and name != "phantom":
            given[key] = [word.strip() for word in given[key].split(",")]
    if "split_names" in given:
        given["split_names"] = parse_split_names(given["split_names"])
    given = {renamed.get(key, key): value for key, value in given.items()}
    if "root" in parameters and "root" not in given:
        raise ValueError(f"no --root found; --collection {name} expects the folder of its images")
    if "path" in parameters and "path" not in given:
        raise ValueError(f"no --root found; --collection {name} expects a dataset's name, folder or file")
    shared = {key: getattr(arguments, key) for key in ("seed", "size") if key in parameters}
    return kind(**given, **shared)


def parse_split_names(text: str) -> dict[str, str]:
    """`images_2020=train,images_2021=test` as a dictionary."""
    pairs = [word.strip().partition("=") for word in text.split(",")]
    if not all(theirs and ours for theirs, _, ours in pairs):
        raise ValueError(f"--split_names {text} found; expected pairs such as images_2020=train,images_2021=test")
    return {theirs: ours for theirs, _, ours in pairs}


def print_summary(summary: dict[str, Any], output: Path, seconds: float) -> None:
    """What was found, split by split."""
    images = sum(counts["images"] for counts in summary["splits"].values())
    rate = f"{images / seconds:.0f} images/s"
    print(f"{output}: {images} images of {summary['size']} x {summary['size']} in {seconds:.1f} s ({rate})")
    sizes = (f"{name} {found['min']} to {found['max']}" for name, found in summary["original_sizes"].items())
    print(f"originals: {', '.join(sizes)} pixels")
    if summary["synthetic"]:
        print("synthetic radiographs: not of any patient")
    for note in summary["notes"]:
        print(f"note: {note}")
    for split, counts in summary["splits"].items():
        views = ", ".join(f"{view} {count}" for view, count in counts["views"].items())
        print(f"{split}: {counts['images']} images, {counts['patients']} patients; {views}")
        for name in summary["label_names"]:
            known = counts["images"] - counts["unknown"][name]
            share = f"{counts['positives'][name] / known:.1%}" if known else "-"
            unknown = f", {counts['unknown'][name]} unknown" if counts["unknown"][name] else ""
            print(f"    {name}: {counts['positives'][name]} positive of {known} ({share}){unknown}")
        if "masks" in counts:
            found = ", ".join(f"{name} in {number}" for name, number in counts["masks"]["images_with"].items())
            print(f"    masks: {counts['masks']['known']} known of {counts['images']}; {found}")
        if "boxes" in counts:
            print(f"    boxes: {counts['boxes']['boxes']} on {counts['boxes']['known']} images")
    print(f"labels: {', '.join(summary['label_names']) or 'none'}{' (one class each)' if summary['exclusive'] else ''}")
    unreadable = summary["rejected"] - summary["duplicates"]["dropped"]
    print(f"rejected: {unreadable}{f' (see {output / REJECTED})' if unreadable else ''}")
    print(f"missing: {summary['missing']}")
    copies = summary["duplicates"]
    print(
        f"copies: {copies['identical']} identical, {copies['near']} nearly identical"
        + (f" (see {output / DUPLICATES})" if copies["identical"] or copies["near"] else "")
        + (f", {copies['dropped']} left out" if copies["dropped"] else "")
    )
    if copies["across_splits"]:
        print(
            f"warning: {copies['across_splits']} pairs of copies in two splits: fine-tuning will refuse this cache; "
            "--drop_duplicates near leaves one of each out",
            file=sys.stderr,
        )
    if 10 * unreadable > images + unreadable:
        with (output / REJECTED).open(newline="", encoding="utf-8") as file:
            first = next(csv.DictReader(file))
        share = f"{unreadable} of {images + unreadable} images were rejected"
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
        drop_duplicates=arguments.drop_duplicates,
        allow_missing=arguments.allow_missing,
        max_images=arguments.max_images,
        num_workers=arguments.num_workers,
        overwrite=arguments.overwrite,
        progress=not arguments.quiet,
    )
    print_summary(summary, arguments.output, time.perf_counter() - start)


if __name__ == "__main__":
    run(main)
