#!/usr/bin/env python
"""The same as `mlvicx explain`."""

import sys

from mlvicx_hf.commands import main

if __name__ == "__main__":
    main(["explain", *sys.argv[1:]])
