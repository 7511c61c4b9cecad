#!/usr/bin/env python
"""The same as `mlvicx index`."""

import sys

from mlvicx_hf.commands import main

if __name__ == "__main__":
    main(["index", *sys.argv[1:]])
