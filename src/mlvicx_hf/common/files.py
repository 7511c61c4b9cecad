"""Write files and folders whole or not at all, read JSON and YAML with checks, compute hashes."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import UserError

RESULTS_FILE = "the results.json of a fine-tuning"  # what messages call it


def sha256(path: Path) -> str:
    """Compute the SHA-256 hash of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_output(output: Path) -> Path:
    """Refuse to write over something.

    Raises:
        FileExistsError: a folder with something in it, the working folder, or anything that is no folder.
    """
    if output.resolve() == Path.cwd():  # a new folder takes the place of an empty one, and this one is in use
        raise FileExistsError(f"{output} is the working folder; expected another one, new or empty")
    if os.path.lexists(output) and not (output.is_dir() and not any(output.iterdir())):
        raise FileExistsError(f"{output} is there already; expected a new or an empty folder")
    return output


@contextmanager
def only_writer(path: Path) -> Iterator[None]:
    """Lock what is going to be written, so that one process at a time writes it.

    The lock is a file beside `path`, whose folder is made if it is not there.

    Raises:
        FileExistsError: another process holds the lock.
    """
    from filelock import FileLock, Timeout

    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.with_name(f".{path.name}.writing")
    try:
        lock = FileLock(file).acquire(blocking=False)
    except Timeout:
        raise FileExistsError(f"{path}: another run is writing it; expected one at a time") from None
    with lock:
        try:
            yield
        finally:
            file.unlink(missing_ok=True)  # while it is locked: afterwards it may be another run's


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Make a file appear at `path` only when it is complete and on the disk. Yield the temporary file beside it.

    Raises:
        FileExistsError: something at `path` that is no file, such as a device; or another process writes it.
    """
    path = path.resolve() if path.is_symlink() else path
    if path.exists() and not path.is_file():
        raise FileExistsError(f"{path} is there already and is no file; expected a file to write")
    temporary = path.with_name(f".{path.name}.tmp")
    with only_writer(path):
        try:
            yield temporary
            sync(temporary)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def read_text(path: Path) -> str:
    """Read a text file.

    Raises:
        UserError: it is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte 0x{error.object[error.start]:02x} found; expected text in UTF-8") from error


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file, whole or not at all."""
    with new_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        FileNotFoundError: no such file.
        UserError: the file holds anything else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected one that a run wrote")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: {error}; expected JSON") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: {type(content).__name__} found; expected a JSON object")
    return content


def read_yaml(path: Path) -> dict[Any, Any]:
    """Read a YAML file that holds a mapping.

    Raises:
        FileNotFoundError: no such file.
        UserError: the file holds anything else.
    """
    import yaml

    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected a YAML file")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {error}; expected YAML in UTF-8") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}; expected a mapping of keys to values")
    return content


def json_field(
    content: dict[str, Any], name: str, kind: type | tuple[type, ...], file: Path, expected: str = RESULTS_FILE
) -> Any:
    """Get a field of a JSON object and check its type.

    Args:
        content: of the file.
        name: with dots for a field within a field, such as "data.cache".
        kind: type or types of the value; a boolean is no int.
        file: for the message.
        expected: what kind of file has this field, for the message.

    Raises:
        UserError: the field is absent or of another type.
    """
    value: Any = content
    for part in name.split("."):
        if not isinstance(value, dict) or part not in value:
            raise UserError(f"{file}: no field {name!r} found; expected {expected}")
        value = value[part]
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise UserError(f"{file}: {name}={value!r} found; expected {' or '.join(k.__name__ for k in kinds)}")
    return value


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Make a folder appear at `path` only when everything in it is written and on the disk.

    Replace an existing `path`. It stays whole until the new folder is in its place; after a kill between two renames
    it lies beside it, as `.NAME.old`.

    Yields:
        The temporary folder beside `path`. An exception removes it and leaves `path` as it was. A temporary folder
        that an earlier kill left is removed first.

    Raises:
        FileExistsError: another process writes the folder.
    """
    path = path.resolve() if path.is_symlink() else path  # the folder on another disk, not a new one beside the link
    temporary = path.with_name(f".{path.name}.tmp")
    with only_writer(path):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():
                    sync(file)
            sync(temporary)
            replace_folder(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            restore_folder(path)
            raise


@contextmanager
def new_output(path: Path) -> Iterator[Path]:
    """As `new_folder`, but what came to `path` since `check_output` stays: it is refused once more at the end."""
    with new_folder(path) as folder:
        yield folder
        check_output(path)


def old_folder(path: Path) -> Path:
    """Name the folder that holds what was at `path` while something new takes its place."""
    return path.with_name(f".{path.name}.old")


def replace_folder(new: Path, path: Path) -> None:
    """Rename a complete folder to `path`, in the place of what is there. After a kill call `restore_folder`."""
    old = old_folder(path)
    if path.exists():
        shutil.rmtree(old, ignore_errors=True)  # only now: without `path` it is all there is
        os.replace(path, old)
    os.replace(new, path)
    sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def restore_folder(path: Path) -> None:
    """Bring the old folder back if nothing new, or an empty folder, is in its place."""
    old = old_folder(path)
    if old.exists() and (not path.exists() or (path.is_dir() and not any(path.iterdir()))):
        os.replace(old, path)


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
