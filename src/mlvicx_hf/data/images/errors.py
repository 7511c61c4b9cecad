"""Errors of files that cannot be read: ours, and those of the libraries that read them."""

import struct
import zlib
from pathlib import Path

from mlvicx_hf.common.errors import UserError

# Pillow raises these for damaged content, depending on the format. Mutated files raise mostly the first three.
DAMAGED = (OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, OverflowError, struct.error, zlib.error)


class UnreadableImageError(UserError):
    """A file that cannot be read as an image. The message names the file and the reason."""

    def __init__(self, file: str | Path, reason: str) -> None:
        super().__init__(file, reason)
        self.file, self.reason = str(file), reason

    def __str__(self) -> str:
        return f"{self.file}: {self.reason}"
