#!/usr/bin/env python
"""The same as `mlvicx export`."""

import sys

from mlvicx_hf.commands import main

if __name__ == "__main__":
    main(["export", *sys.argv[1:]])
