#!/usr/bin/env python
"""The same as `mlvicx convert`."""

import sys

from mlvicx_hf.commands import main

if __name__ == "__main__":
    main(["convert", *sys.argv[1:]])
