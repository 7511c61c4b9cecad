#!/usr/bin/env python
"""The same as `mlvicx card`."""

import sys

from mlvicx_hf.commands import main

if __name__ == "__main__":
    main(["card", *sys.argv[1:]])
