#!/usr/bin/env python
"""The same as `mlvicx pretrain`."""

import sys

from mlvicx_hf.commands import main

if __name__ == "__main__":
    main(["pretrain", *sys.argv[1:]])
