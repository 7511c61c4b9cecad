#!/usr/bin/env python
"""The same as `mlvicx publish`."""

import sys

from mlvicx_hf.commands import main

if __name__ == "__main__":
    main(["publish", *sys.argv[1:]])
