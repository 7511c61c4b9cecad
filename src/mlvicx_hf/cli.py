# Copyright 2026 The mlvicx_hf authors. Licensed under the Apache License, Version 2.0.
"""How every script ends: a user's error is one line on stderr and exit code 2, anything else keeps its traceback."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from huggingface_hub.errors import StrictDataclassError

# What the package raises for input that does not fit: arguments and files, a missing extra, a loss that is not finite.
USER_ERRORS = (ValueError, OSError, ImportError, StrictDataclassError, FloatingPointError)


def run(main: Callable[[], None]) -> None:
    """Call a script's `main` and turn a user's error into one clear line.

    Set `MLVICX_TRACEBACK=1` to see where it came from.

    Raises:
        SystemExit: with code 2 after a user's error, 130 after Ctrl-C.
    """
    try:
        main()
    except USER_ERRORS as error:
        if os.environ.get("MLVICX_TRACEBACK") == "1":
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
