"""What every room may use: errors, files, words, the machine, progress, signals, provenance."""
