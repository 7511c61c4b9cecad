# Copyright 2026 The mlvicx_hf authors. Licensed under the Apache License, Version 2.0.
"""Speed as ratios within one run, since the speed of a machine changes from one minute to the next."""
