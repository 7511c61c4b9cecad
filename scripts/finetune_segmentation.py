#!/usr/bin/env python
"""The same as `mlvicx segment`."""

import sys

from mlvicx_hf.commands import main

if __name__ == "__main__":
    main(["segment", *sys.argv[1:]])
