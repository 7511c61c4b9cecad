#!/usr/bin/env python
"""The same as `mlvicx compare`."""

import sys

from mlvicx_hf.commands import main

if __name__ == "__main__":
    main(["compare", *sys.argv[1:]])
