#!/usr/bin/env python
"""The same as `mlvicx evaluate`."""

import sys

from mlvicx_hf.commands import main

if __name__ == "__main__":
    main(["evaluate", *sys.argv[1:]])
