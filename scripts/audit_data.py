#!/usr/bin/env python
"""The same as `mlvicx audit`."""

import sys

from mlvicx_hf.commands import main

if __name__ == "__main__":
    main(["audit", *sys.argv[1:]])
