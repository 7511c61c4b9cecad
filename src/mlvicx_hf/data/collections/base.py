"""Collections of radiographs: their records and listings, and what all of them need (tables, views, file names)."""

import math
import os
import re
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path, PurePosixPath
from typing import ClassVar, NamedTuple

import numpy as np

from mlvicx_hf.common.errors import UserError

from ..masks import check_mask_names

SPLITS = ("train", "validation", "test")
UNKNOWN_VIEWS = ("", "UNKNOWN", "NAN", "NA", "N/A", "<NA>", "NONE", "NULL")
# A word of a lateral view, in English, French, German, Spanish or Portuguese; accents are left out before
_LATERAL = re.compile(r"[LR]?LAT|\w*LATERAL\w*|SEITLICH\w*|PROFIL|PERFIL")
_SIDES = ("L", "LL", "RL")  # the first word of a lateral view
_FRONTAL = {
    "PA": "PA",
    "POSTEROANTERIOR": "PA",
    "POSTERIORANTERIOR": "PA",
    "AP": "AP",
    "ANTEROPOSTERIOR": "AP",
    "ANTERIORPOSTERIOR": "AP",
    "FRONTAL": "FRONTAL",
    "FRONT": "FRONTAL",
}


class Box(NamedTuple):
    """The place of a finding, in pixels of the record's `frame`. The lower right corner is exclusive."""

    label: str  # name of the finding, as the collection spells its labels
    x_min: float  # left edge
    y_min: float  # upper edge
    x_max: float  # right edge
    y_max: float  # lower edge


class Drawing(NamedTuple):
    """A drawn radiograph."""

    pixels: np.ndarray  # uint8 [H, W]
    mask: np.ndarray | None = None  # values [H, W] as in a mask file; None if it is unknown


@dataclass(frozen=True, slots=True)
class Record:
    """One radiograph: the source of its pixels (a file, or a drawing) and all that is known of it.

    Attributes:
        name: name in the collection, usually the file relative to the root.
        patient_id: the patient. No patient is ever in two splits.
        view: PA, AP, FRONTAL (one of the two), LATERAL or UNKNOWN.
        labels: 1, 0 or NaN (unknown) in the order of the collection's label names; empty without labels.
        split: train, validation or test if the collection has splits.
        path: file to read.
        draw: without a file, draws the pixels and perhaps their mask. It must pickle.
        load: if the image is inside another file, gives its content. It must pickle.
        mask_path: file of the mask; None if it is unknown or drawn.
        draw_mask: if a table describes the mask, draws its values [H, W] as in a mask file, with the aspect ratio of
            the image. It must pickle.
        boxes: None if they are unknown; empty if a reader looked and drew none.
        frame: width and height in pixels in which boxes are measured; None for those of the image.
        sex: F, M, or empty for unknown.
        age: years; NaN for unknown.
    """

    name: str
    patient_id: str
    view: str = "UNKNOWN"
    labels: tuple[float, ...] = ()
    split: str | None = None
    path: Path | None = None
    draw: Callable[[], Drawing] | None = None
    load: Callable[[], bytes] | None = None
    mask_path: Path | None = None
    draw_mask: Callable[[], np.ndarray] | None = None
    boxes: tuple[Box, ...] | None = None
    frame: tuple[int, int] | None = None
    sex: str = ""
    age: float = math.nan


@dataclass(frozen=True)
class Listing:
    """The content of a collection, before any pixel is read.

    Attributes:
        records: the radiographs on the disk.
        label_names: names of the labels.
        exclusive: exactly one label of each image is positive (one class each).
        missing: files that are listed but absent.
        notes: notes for the user, one line each.
        mask_names: empty without masks. One name: binary masks of that structure. Several: classes by pixel value, of
            which 0 is the background.
        policy: choices that made the labels, such as {"readers": "any"}. Every result names them.
        patients_known: false if the patients are unknown, so that each image counts as a patient of its own.
        patient_source: the collection that numbers the patients, if it is another one. Caches with the same source can
            be compared patient by patient.
        contents: for collections that can only be read in order: gives the content of every record from a given number,
            or the error of reading it.
        origin: what such contents depend on, such as a hash of the files' sizes and times; other records have files.

    Raises:
        UserError: mask names are empty or repeated.
    """

    records: list[Record]
    label_names: tuple[str, ...] = ()
    exclusive: bool = False
    missing: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)
    mask_names: tuple[str, ...] = ()
    policy: dict[str, str] = field(default_factory=dict)
    patients_known: bool = True
    patient_source: str | None = None
    contents: Callable[[int], Iterator[bytes | Exception]] | None = None
    origin: str = ""

    def __post_init__(self) -> None:
        check_mask_names(self.mask_names)


class Collection(ABC):
    """A collection of radiographs. To add one, give it a name and list its records.

    Attributes:
        name: name for `mlvicx prepare --collection`.
        source: prefix of the column `source` in the cache; the name, unless a subclass says otherwise.
        synthetic: whether the images are drawn, not taken of patients.
    """

    name: str
    source: str
    synthetic: bool = False

    def __init_subclass__(cls) -> None:
        if "name" in vars(cls) and "source" not in vars(cls):
            cls.source = cls.name

    @abstractmethod
    def read(self) -> Listing:
        """List the radiographs. Raise UserError or OSError for files that do not look as expected."""


@dataclass
class ReleasedCollection(Collection):
    """A collection with tables in its release. Fields of a subclass become options of `mlvicx prepare`.

    Attributes:
        root: folder of the release.
        layout: where the images lie, for the error message if there are none.
    """

    root: str | Path
    layout: ClassVar[str] = "the images that its tables list"

    @property
    def folder(self) -> Path:
        """The root as a path."""
        return Path(self.root)

    @abstractmethod
    def list_all(self) -> Listing:
        """List everything in the tables, whether or not its files exist."""

    def read(self) -> Listing:
        """List the radiographs whose files exist. Others are `missing`.

        Raises:
            FileNotFoundError: no file exists.
        """
        listing = self.list_all()
        records, missing = keep_present(listing.records)
        if not records:
            raise FileNotFoundError(f"{self.root}: none of the {len(missing)} images found; expected {self.layout}")
        return replace(listing, records=records, missing=missing)


def keep_present(records: Iterable[Record]) -> tuple[list[Record], tuple[str, ...]]:
    """Keep the records whose image, and mask if any, are on the disk. Also return the names of the others."""
    present, missing = [], []
    for record in records:
        if not (os.path.isfile(record.path) if record.path is not None else record.draw or record.load):
            missing.append(record.name)
        elif record.mask_path is not None and not os.path.isfile(record.mask_path):
            missing.append(f"{record.mask_path} (mask of {record.name})")
        else:
            present.append(record)
    return present, tuple(missing)


def normalize_view(view: str) -> str | None:
    """Turn a view into PA, AP, FRONTAL (one of these two), LATERAL or UNKNOWN, or None if it is not understood.

    `_`, `-`, `/` and the like count as blanks. Any view with a word such as LAT or lateral is lateral. Otherwise the
    first word that is known decides: `AP_horizontal` and `Chest AP supine` are AP.
    """
    text = view.strip().upper()
    text = "".join(letter for letter in unicodedata.normalize("NFKD", text) if not unicodedata.combining(letter))
    if text in UNKNOWN_VIEWS:
        return "UNKNOWN"
    joined = re.sub(r"(POSTERO|POSTERIOR|ANTERO|ANTERIOR)[\s_-]+(?=ANTERIOR|POSTERIOR)", r"\1", text.replace(".", ""))
    words = re.split(r"[\W_]+", joined)
    if words[0] in _SIDES or any("BILATERAL" not in word and _LATERAL.fullmatch(word) for word in words):
        return "LATERAL"
    return next((_FRONTAL[word] for word in words if word in _FRONTAL), None)


def spelled_as_on_disk(path: Path) -> Path:
    """A path with letters such as ü in the form, of one or of two characters, in which the file has them, if it exists.

    File names of macOS often have two characters, and tables one. A folder on the way may have another form than its
    files.
    """
    if str(path).isascii() or os.path.lexists(path):
        return path
    folder = spelled_as_on_disk(path.parent)
    forms = (path.name, *(unicodedata.normalize(form, path.name) for form in ("NFC", "NFD")))
    return next(filter(os.path.lexists, (folder / name for name in forms)), path)


@cache
def _real(folder: str) -> str:
    return os.path.realpath(folder)


def file_below(root: Path, name: str, where: str = "") -> Path:
    """Find the file `name` below `root`, without leaving `root` by `..`, an absolute path or a link.

    Raises:
        UserError: the path leads out of `root`. The message begins with `where`.
    """
    relative = PurePosixPath(name.replace("\\", "/"))
    if relative.is_absolute() or ".." in relative.parts or Path(name).is_absolute():
        raise UserError(f"{where}file {name!r} found; expected a path below the root {root}")
    path = spelled_as_on_disk(root / relative)
    real = os.path.realpath(path) if path.is_symlink() else os.path.join(_real(str(path.parent)), path.name)
    if not Path(real).is_relative_to(_real(str(root))):
        raise UserError(f"{where}file {name!r} is a link that leads out of the root {root}")
    return path


SPLIT_NAMES = {name: name for name in SPLITS} | dict.fromkeys(("val", "valid", "dev"), "validation")
SPLIT_NAMES |= {"training": "train", "testing": "test"}


def files_by_name(
    files: Iterable[Path], names: Iterable[str], name_of: Callable[[Path], str] = lambda file: file.stem
) -> dict[str, Path]:
    """Map names, by default without suffix, to files. Ignore files whose name is not among `names`.

    Raises:
        UserError: two files have the same name, such as a DICOM file and its conversion.
    """
    wanted = set(names)
    found: dict[str, Path] = {}
    for file in files:
        name = name_of(file)
        if name in wanted and found.setdefault(name, file) is not file:
            raise UserError(f"{found[name]} and {file} found; expected one file an image")
    return found
