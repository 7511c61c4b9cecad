#!/usr/bin/env python
"""The same as `mlvicx predict`."""

import sys

from mlvicx_hf.commands import main

if __name__ == "__main__":
    main(["predict", *sys.argv[1:]])
