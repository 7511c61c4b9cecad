#!/usr/bin/env python
"""The same as `mlvicx prepare`."""

import sys

from mlvicx_hf.commands import main

if __name__ == "__main__":
    main(["prepare", *sys.argv[1:]])
