"""Errors that the user can mend, and how a command ends: one line for these, a traceback for anything else."""

import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TypeVar

T = TypeVar("T")
_VALIDATOR = re.compile(r"^Class validation error for validator '\w+': \w+: ")  # what huggingface_hub puts in front


class UserError(ValueError):
    """Input that the user can mend: a flag, a file, a table, a model. The message names what was found and expected."""


class MissingExtraError(UserError, ImportError):
    """An optional library is not installed. The message names the extra that brings it."""


def require(what: str, extra: str, *libraries: str) -> None:
    """Refuse to start work without the libraries of an extra.

    Raises:
        MissingExtraError: naming what needs them, those that are missing, and the extra that brings them.
    """
    missing = [name for name in libraries if find_spec(name) is None]
    if missing:
        raise MissingExtraError(f'{what} needs {", ".join(missing)}: pip install ".[{extra}]" in the repository')


@contextmanager
def user_input() -> Iterator[None]:
    """Turn a ValueError into a `UserError`, around a call that does nothing but check what the user gave.

    The models and other libraries do not know `UserError`.
    """
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from error


def is_users(error: BaseException) -> bool:
    """Whether the user can mend an error: `UserError`, files, the network, a loss that is not finite, a configuration.

    A plain ValueError, ours or of a library, is a bug and keeps its traceback.
    """
    if isinstance(error, (UserError, OSError, FloatingPointError)):
        return True
    hub, weights = map(sys.modules.get, ("huggingface_hub.errors", "safetensors"))  # not imported: they raised nothing
    if hub is not None and isinstance(error, (hub.StrictDataclassError, hub.HTTPError)):  # of the HTTP library, too
        return True
    return weights is not None and isinstance(error, weights.SafetensorError) and "I/O error" in str(error)


def run(main: Callable[[], T]) -> T:
    """Call a command's `main` and turn a user's error into one clear line on stderr.

    Set `MLVICX_TRACEBACK=1` to see where the error came from.

    Raises:
        SystemExit: with code 2 after a user's error, 130 after Ctrl-C.
    """
    try:
        return main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except Exception as error:  # everything else goes on its way
        if not is_users(error) or os.environ.get("MLVICX_TRACEBACK") == "1":
            raise
        text = " ".join(str(error).split())
        print(f"error: {_VALIDATOR.sub('', text)}", file=sys.stderr)
        raise SystemExit(2) from None
