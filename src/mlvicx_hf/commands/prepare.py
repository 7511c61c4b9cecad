"""The command `mlvicx prepare`."""

from __future__ import annotations

import inspect
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlvicx_hf.common.arguments import CommandParser
from mlvicx_hf.common.errors import UserError
from mlvicx_hf.data.collections import KINDS

if TYPE_CHECKING:  # importing the collections takes seconds, which --help does not have
    from mlvicx_hf.data.collections.base import Collection

NAMES = tuple(KINDS)
OF_CACHE = (
    *("size", "fit", "splits", "seed", "drop_duplicates", "drop_flat"),
    *("allow_missing", "max_images", "num_workers", "overwrite"),
)
LISTS = ("label_columns", "label_names", "mask_names")  # joined by commas


def parser() -> CommandParser:
    """Make the parser."""
    made = CommandParser(
        "prepare",
        "--collection NAME [--root DIR] --output CACHE [options]",
        "Read a collection of chest radiographs once and write a cache that training reads. A run that was killed "
        "goes on where it was when the same command is given again.",
        [
            "mlvicx prepare --collection folder --root my_images --output caches/mine",
            "mlvicx prepare --collection folder --root my_images --output caches/lungs --mask_names lungs",
            "mlvicx prepare --collection nih14 --root ChestX-ray14 --output caches/nih14",
            "mlvicx prepare --collection hf --root org/radiographs --streaming --output caches/hub",
            "mlvicx prepare --collection phantom --output caches/phantom",
        ],
    )
    add = made.add_argument
    add("--collection", required=True, choices=NAMES, metavar="NAME", help=", ".join(NAMES))
    text = "folder of the images (hf: name on the Hub, folder, parquet or Arrow files)"
    add("--root", metavar="DIR", help=text)
    add("--output", required=True, type=Path, metavar="CACHE", help="folder of the cache, absent or empty")
    text = "folder, nih14: table, from here or from the root (.csv, .jsonl, .parquet)"
    add("--metadata", type=Path, metavar="FILE", help=text)
    add("--size", type=int, default=256, metavar="N", help="side of the cached images in pixels (default 256)")
    text = "auto: the collection's own, or 70/10/20 of the patients with labels; none: all train; else a CSV file such "
    text += "as another cache's splits.csv"
    add("--splits", default="auto", metavar="auto|none|FILE", help=text)
    text = "leave out copies of an image: none, identical or near (default none)"
    add("--drop_duplicates", choices=("none", "identical", "near"), default="none", metavar="KIND", help=text)
    add("--drop_flat", action="store_true", help="leave out images without contrast or texture")
    add("--overwrite", action="store_true", help="replace a cache once the new one is complete")
    add("--quiet", action="store_true", help="show no progress bar")
    add = made.advanced.add_argument
    text = "what happens to images that are not square: pad, squash or crop (default pad)"
    add("--fit", choices=("pad", "squash", "crop"), default="pad", metavar="KIND", help=text)
    add("--seed", type=int, default=0, metavar="N", help="of the splits, and of phantoms (default 0)")
    add("--num_workers", type=int, metavar="N", help="processes (default one a core)")
    add("--max_images", type=int, metavar="N", help="only this number of images, for a trial")
    add("--allow_missing", action="store_true", help="go on without listed images that are not there, or not readable")
    _add_collections(made)
    return made


def _add_collections(made: CommandParser) -> None:
    text = "each takes some of these; one that it does not take is an error"
    add = made.add_argument_group("options of single collections", text).add_argument
    add("--file_column", metavar="NAME", help="folder: column of the file (default file_name, file, image or path)")
    add("--image_column", metavar="NAME", help="hf: column of the image (default the only one)")
    add("--patient_column", metavar="NAME", help="folder, hf: column of the patient (default patient_id)")
    add("--view_column", metavar="NAME", help="folder, hf: column of the view (default view)")
    add("--sex_column", metavar="NAME", help="folder, hf: column of the sex (default sex)")
    add("--age_column", metavar="NAME", help="folder, hf: column of the age (default age)")
    text = "folder, hf: patients that differ in zeros, .0, case or blanks are others (exact) or the same (normalised)"
    add("--patient_ids", choices=("exact", "normalised"), help=text)
    add("--label_columns", metavar="NAMES", help="folder, hf: columns of the labels, joined by commas")
    text = "folder, hf: names of the findings, in the order of lists of 0 and 1 in a column labels, joined by commas"
    add("--label_names", metavar="NAMES", help=text)
    text = "folder: what folders such as train/NORMAL mean (default read: splits and classes)"
    add("--folders", choices=("read", "classes", "ignore"), help=text)
    add("--mask_column", metavar="NAME", help="folder, hf: column of the mask (folder: default mask_file_name)")
    text = (
        "folder, hf: the structure of binary masks, or the classes by pixel value, background first, joined by commas"
    )
    add("--mask_names", metavar="NAMES", help=f"{text} (default mask); phantom: lungs, heart or a finding")
    text = "folder, hf, chexpert, mimic_cxr_jpg: what a label of -1 means"
    add("--uncertain", choices=("ignore", "ones", "zeros"), help=text)
    add("--config_name", metavar="NAME", help="hf: configuration, where there are several")
    add("--revision", metavar="NAME", help="hf: branch, tag or commit on the Hub")
    add("--streaming", action="store_true", default=None, help="hf: read in order, without downloading all of it")
    text = "hf: splits to read and what they are, such as images_2020=train,images_2021=test"
    add("--split_names", metavar="PAIRS", help=text)
    add("--readers", choices=("any", "majority"), help="vinbigdata, vindr: how many must see a finding (default any)")
    add("--classes", choices=("target", "detailed"), help="rsna: one label, or three classes (default target)")
    add("--mapping", metavar="FILE", help="rsna: the challenge's mapping to NIH's files, which tells the patients")
    add("--headers", metavar="FILE", help="rsna: table of the DICOM headers, which tells view, sex and age")
    add("--masks", choices=("table", "files"), help="siim: of the run lengths, or PNG files (default table)")
    add("--num_patients", type=int, metavar="N", help="phantom: (default 400)")
    add("--images_per_patient", type=int, metavar="N", help="phantom: (default 3)")


def make_collection(name: str, options: Mapping[str, Any], seed: int, size: int) -> Collection:
    """Make a collection from the options that were given. Refuse an option that its constructor does not take."""
    from mlvicx_hf.data.collections import collection_class

    kind, given = collection_class(name), dict(options)
    parameters = inspect.signature(kind).parameters
    strange = [f"--{key}" for key in given if key not in parameters]
    if strange:
        raise UserError(f"{', '.join(strange)} found; --collection {name} does not take it")
    for key in LISTS:
        if key in given and name != "phantom":
            given[key] = [word.strip() for word in given[key].split(",")]
    if "split_names" in given:
        given["split_names"] = parse_split_names(given["split_names"])
    if "root" in parameters and "root" not in given:
        expected = "a dataset's name, folder or file" if name == "hf" else "the folder of its images"
        raise UserError(f"no --root found; --collection {name} expects {expected}")
    shared = {key: value for key, value in (("seed", seed), ("size", size)) if key in parameters}
    return kind(**given, **shared)


def parse_split_names(text: str) -> dict[str, str]:
    """Read `images_2020=train,images_2021=test` as a dictionary."""
    pairs = [word.strip().partition("=") for word in text.split(",")]
    if not all(theirs and ours for theirs, _, ours in pairs):
        raise UserError(f"--split_names {text} found; expected pairs such as images_2020=train,images_2021=test")
    return {theirs: ours for theirs, _, ours in pairs}


def main(words: Sequence[str] | None = None) -> None:
    """Prepare a cache."""
    given = vars(parser().parse_args(words))
    name, output, quiet = given.pop("collection"), given.pop("output"), given.pop("quiet")
    options = {key: given.pop(key) for key in OF_CACHE}
    from mlvicx_hf.data.cache.prepare import check_cache_output, prepare

    check_cache_output(output, options["overwrite"])
    start = time.perf_counter()
    of_collection = {key: value for key, value in given.items() if value is not None}
    collection = make_collection(name, of_collection, options["seed"], options["size"])
    summary = prepare(collection, output, **options, progress=not quiet)
    print_summary(summary, output, time.perf_counter() - start)


def print_summary(summary: dict[str, Any], output: Path, seconds: float) -> None:
    """Print what was found, split by split; warnings go to standard error."""
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
        _print_split(split, counts, summary["label_names"])
    print(f"labels: {', '.join(summary['label_names']) or 'none'}{' (one class each)' if summary['exclusive'] else ''}")
    _print_losses(summary, output, images)


def _print_split(split: str, counts: dict[str, Any], label_names: Sequence[str]) -> None:
    views = ", ".join(f"{view} {count}" for view, count in counts["views"].items())
    print(f"{split}: {counts['images']} images, {counts['patients']} patients; {views}")
    for name in label_names:
        known = counts["images"] - counts["unknown"][name]
        share = f"{counts['positives'][name] / known:.1%}" if known else "-"
        positive = counts["positives"][name]
        print(
            f"    {name}: {positive} positive ({share}), {known - positive} negative, {counts['unknown'][name]} unknown"
        )
    if "masks" in counts:
        found = ", ".join(f"{name} in {number}" for name, number in counts["masks"]["images_with"].items())
        print(f"    masks: {counts['masks']['known']} known of {counts['images']}; {found}")
    if "boxes" in counts:
        print(f"    boxes: {counts['boxes']['boxes']} on {counts['boxes']['known']} images")


def _print_losses(summary: dict[str, Any], output: Path, images: int) -> None:
    """Print what was rejected, missing or there twice."""
    from mlvicx_hf.data.cache.assembly import NOTED, REJECTED
    from mlvicx_hf.data.cache.cache import DUPLICATES

    copies = summary["duplicates"]
    unreadable = summary["rejected"] - copies["dropped"] - (summary["flat"] if summary["drop_flat"] else 0)
    print(f"rejected: {unreadable}{f' (see {output / REJECTED})' if unreadable else ''}")
    print(f"missing: {summary['missing']}")
    if summary["noted"] or summary["flat"]:
        print(f"noted: {summary['noted']} grey scales, {summary['flat']} flat images (see {output / NOTED})")
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
        file, reason = summary["first_rejected"]
        share = f"{unreadable} of {images + unreadable} images were rejected"
        print(f"warning: {share}, such as {file}: {reason}", file=sys.stderr)
