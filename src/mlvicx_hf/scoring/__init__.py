"""Arrays in, numbers out: metrics, probes, intervals, tests."""
