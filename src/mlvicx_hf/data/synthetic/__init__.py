"""Phantoms: synthetic radiographs whose every label is known."""
