"""Copies of one image: found, counted, left out, and listed across caches."""
