#!/usr/bin/env python
"""The same as `mlvicx similar`."""

import sys

from mlvicx_hf.commands import main

if __name__ == "__main__":
    main(["similar", *sys.argv[1:]])
