#!/usr/bin/env python
"""The same as `mlvicx demo`."""

import sys

from mlvicx_hf.commands import main

if __name__ == "__main__":
    main(["demo", *sys.argv[1:]])
