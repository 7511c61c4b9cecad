#!/usr/bin/env python
"""The same as `mlvicx classify`."""

import sys

from mlvicx_hf.commands import main

if __name__ == "__main__":
    main(["classify", *sys.argv[1:]])
