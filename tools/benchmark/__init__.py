"""Speed as ratios within one run, since the speed of a machine changes from one minute to the next."""
