"""Model cards, made from the files that runs wrote."""
