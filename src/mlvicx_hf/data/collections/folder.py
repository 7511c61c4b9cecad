"""Any folder of radiographs, with or without a table of metadata (the `imagefolder` convention)."""

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path

from mlvicx_hf.common.errors import UserError
from mlvicx_hf.common.text import some

from ..images.pixels import describe_skipped, image_files
from ..options import check_choice
from .base import Collection, Listing, Record, file_below, keep_present, spelled_as_on_disk
from .cells import label_cells, same_name
from .labels import FILE_COLUMNS, read_labels
from .layout import FOLDER_MEANINGS, describe_layout, read_layout, refuse_masks
from .metadata import MASK_COLUMN, TableOptions, plain_name, read_records, usual_names
from .tables import FILLED, Columns, check_unique, find_table, numbered, read_cells, read_columns

TABLE_SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".parquet", ".gz")
METADATA_NAMES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")


@dataclass
class FolderCollection(TableOptions, Collection):
    """Images below a folder.

    Without metadata every image found counts. With metadata (`metadata.csv`, `.jsonl` or `.parquet` in the folder, or
    the given file) the listed images count. Labels are the first of these: the columns of `label_columns` (0, 1, or
    empty for unknown); a column `label` with one class name per row; a column `labels` with findings (names joined by
    `|`, lists, objects; `No Finding` for none, empty for unknown); all other columns of 0, 1 and empty cells, unless
    their names are of no finding. `cells` says what a cell may hold. Columns `sex`
    (F, M, female, male and the like) and `age` (years) are read if they exist.

    A mask is a file relative to the root, in `mask_file_name` if that exists. Other options are `TableOptions`.

    Args:
        root: the folder. Nothing outside it is read, not even through a link.
        metadata: table, found from the working directory or else from the root.
        file_column: column of the file, relative to the root; by default the first of `FILE_COLUMNS`.
        folders: what folders such as `train/PNEUMONIA` mean without metadata, see `layout.read_layout`.
    """

    name = "folder"

    root: str | Path
    metadata: str | Path | None = None
    _: KW_ONLY
    file_column: str | None = None
    folders: str | None = None

    def __post_init__(self) -> None:
        label_cells(self.uncertain)  # refuse an unknown policy before anything is read
        if self.folders is not None:
            check_choice("folders", self.folders, FOLDER_MEANINGS)
        self.folder = Path(self.root)

    def read(self) -> Listing:
        """List the images of the metadata, or those found."""
        if not self.folder.is_dir():
            raise FileNotFoundError(f"{self.folder}: no such folder; expected --root to be a folder of images")
        table = self._find_metadata()
        if table is not None:
            return self._read_table(table)
        expected = None
        if self.mask_column is not None or self.mask_names is not None:
            expected = f"a table with the masks in column {self.mask_column or MASK_COLUMN}"
        elif self.uncertain is not None or self.label_names is not None:
            expected = f"a table with labels, for --{'uncertain' if self.uncertain is not None else 'label_names'}"
        if expected is not None:
            raise FileNotFoundError(f"{self.folder}: none of {', '.join(METADATA_NAMES)} found; expected {expected}")
        return self._scan()

    def _find_metadata(self) -> Path | None:
        if self.metadata is not None:
            return find_table(self.folder, expected="the table of --metadata", given=self.metadata)
        found = [self.folder / name for name in METADATA_NAMES if (self.folder / name).is_file()]
        if len(found) > 1:
            raise UserError(f"{some(map(str, found))} found; say which one counts with --metadata")
        return found[0] if found else None

    def _scan(self) -> Listing:
        """List every image below the root, sorted. Skip hidden files and links that lead outside."""
        names, outside, skipped = [], 0, Counter[str]()
        for file in image_files(self.folder, skipped):
            name = file.relative_to(self.folder).as_posix()
            try:
                file_below(self.folder, name)
            except ValueError:
                outside += 1
                continue
            names.append(name)
        links = f" ({outside} links that lead outside were skipped)" if outside else ""
        if not names:
            raise UserError(
                f"{self.folder}: no images found{links}; expected PNG, JPEG, TIFF, WebP, BMP, JPEG 2000 or DICOM"
            )
        if tables := self._deep_tables(skipped):
            raise UserError(
                f"{tables[0]} found; expected metadata.csv with all images in {self.folder}, or --metadata TABLE; "
                "--collection hf reads a table a split, and --folders ignore the images alone"
            )
        notes = ["no metadata, so no patients are known: each image is counted as a patient of its own"]
        if outside:
            notes.append(f"{outside} links that lead out of {self.folder} were skipped")
        notes += filter(None, [describe_skipped(skipped)])
        if unread := sorted(file.name for file in self.folder.iterdir() if file.suffix.lower() in TABLE_SUFFIXES):
            notes.append(f"tables in {self.folder} that were not read: {some(unread)}; --metadata takes one")
        if self.folders != "ignore":
            refuse_masks(self.folder, names)
        layout = read_layout(self.folder, names, self.folders)
        notes += describe_layout(layout)
        splits: Sequence[str | None] = layout.splits or [None] * len(names)
        classes = sorted(set(layout.classes or ()))
        labels = [tuple(float(name == own) for name in classes) for own in layout.classes or names]
        records = [
            Record(name, name, labels=label, split=split, path=self.folder / name)
            for name, label, split in zip(names, labels, splits, strict=True)
        ]
        return Listing(records, tuple(classes), bool(classes), notes=notes, patients_known=False)

    def _deep_tables(self, skipped: Iterable[str]) -> list[Path]:
        """Find tables of metadata in other places than expected, such as one a split, so that none is passed over.

        In the folder itself a table of any name counts, if it has a column of files.
        """
        if self.folders == "ignore" or not set(skipped) & set(TABLE_SUFFIXES):
            return []
        files = (file for file in self.folder.rglob("*.*") if file.suffix.lower() in TABLE_SUFFIXES)
        seen = (file for file in files if not any(part[0] == "." for part in file.relative_to(self.folder).parts))
        return sorted(
            file
            for file in seen
            if file.name.lower().startswith("metadata.") or (file.parent == self.folder and _lists_files(file))
        )

    def _read_table(self, table: Path) -> Listing:
        given = (self.file_column, self.patient_column, self.mask_column, *(self.label_columns or ()))
        columns, notes = usual_names(table, read_columns(table), given, self.meant)
        file_column = self._choose_file_column(table, columns)
        mask_column = self._choose_mask_column(table, columns)
        names = self._relative(columns[file_column])
        masks = [""] * len(names) if mask_column is None else self._relative(columns[mask_column])
        read_cells(table, file_column, names, FILLED)
        check_unique(table, [self._spelled(name) for name in names])
        rows, known = read_records(table, columns, names, self.patient_column, notes, self.patient_ids)
        skip = (file_column, self.patient_column, mask_column)
        labels = read_labels(table, columns, self.label_columns, skip, self.uncertain, self.label_names)
        records = []
        for number, (row, mask, label) in numbered(table, zip(rows, masks, labels.rows, strict=True)):
            where = f"{table}: row {number}: "
            path = file_below(self.folder, row.name, where)
            mask_path = file_below(self.folder, mask, where) if mask else None
            records.append(replace(row, labels=label, path=path, mask_path=mask_path))
        if all(row.split is None for row in records):  # the table does not say, but the folders may
            layout = read_layout(self.folder, names, self.folders)
            notes += describe_layout(replace(layout, classes=None, others=()))
            if layout.splits is not None:
                records = [replace(row, split=split) for row, split in zip(records, layout.splits, strict=True)]
        notes += self._note_unlisted(table, [*names, *masks])
        records, missing = keep_present(records)
        if not records and mask_column is None:
            raise FileNotFoundError(self._nothing_found(table, columns, file_column, missing))
        return Listing(
            records,
            labels.names,
            labels.exclusive,
            missing,
            [*notes, *labels.notes],
            mask_names=() if mask_column is None else tuple(self.mask_names or ("mask",)),
            policy=self.policy,
            patients_known=known,
        )

    def _relative(self, names: Sequence[str]) -> list[str]:
        """Write absolute paths below the root relative to it, and slashes for the backslashes of Windows.

        Other paths stay as they are, and are refused later.
        """
        roots = (Path(os.path.abspath(self.folder)), Path(os.path.realpath(self.folder)))
        names = [name.replace("\\", "/") for name in names]
        below = [next((root for root in roots if Path(name).is_relative_to(root)), Path()) for name in names]
        return [
            Path(name).relative_to(root).as_posix() if root.name else name
            for name, root in zip(names, below, strict=True)
        ]

    def _spelled(self, name: str) -> str:
        """Write a path so that two names of one file are the same."""
        found = name if name.isascii() else os.path.relpath(spelled_as_on_disk(self.folder / name), self.folder)
        return os.path.normpath(found)

    def _note_unlisted(self, table: Path, listed: Sequence[str]) -> list[str]:
        """Note the images below the root that the table does not list."""
        known = {os.path.normpath(spelled_as_on_disk(self.folder / name)) for name in listed}
        others = [file for file in image_files(self.folder, onerror=None) if os.path.normpath(file) not in known]
        if not others:
            return []
        such = others[0].relative_to(self.folder)
        return [f"images below {self.folder} that {table.name} does not list, left out: {len(others)}, such as {such}"]

    def _nothing_found(self, table: Path, columns: Columns, file_column: str, missing: Sequence[str]) -> str:
        """Say that no listed file exists, and which files may be meant."""
        found = f"{table}: none of the {len(missing)} files of column {file_column} found, such as {missing[0]}"
        for name in FILE_COLUMNS:
            if name != file_column and any((self.folder / file).is_file() for file in columns.get(name, ())):
                return f"{found}; column {name} has files that exist: --file_column {name} takes it"
        stem = same_name(Path(missing[0]).stem)
        alike = next((file for file in image_files(self.folder, onerror=None) if same_name(file.stem) == stem), None)
        expected = f"; {alike.relative_to(self.folder)} is there" if alike else ""
        return f"{found}{expected}; expected paths below {self.folder}, with their suffix and in their case"

    def _choose_file_column(self, table: Path, columns: Columns) -> str:
        candidates = FILE_COLUMNS if self.file_column is None else (self.file_column,)
        for name in candidates:
            if name in columns:
                return name
        raise UserError(
            f"{table}: columns {some(read_columns(table), 30)} found; expected the file in {' or '.join(candidates)} "
            "(--file_column names another)"
        )

    def _choose_mask_column(self, table: Path, columns: Columns) -> str | None:
        column = self.mask_column or MASK_COLUMN
        if column in columns:
            return column
        if self.mask_column is None and self.mask_names is None:
            return None
        raise UserError(
            f"{table}: columns {some(read_columns(table), 30)} found; expected the mask in {column} "
            "(--mask_column names another)"
        )


def _lists_files(table: Path) -> bool:
    """Whether a file is a table with a column of files."""
    try:
        return bool({plain_name(name) for name in read_columns(table)} & {plain_name(name) for name in FILE_COLUMNS})
    except UserError:
        return False
