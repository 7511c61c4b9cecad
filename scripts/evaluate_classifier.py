#!/usr/bin/env python
"""The same as `mlvicx transfer`."""

import sys

from mlvicx_hf.commands import main

if __name__ == "__main__":
    main(["transfer", *sys.argv[1:]])
