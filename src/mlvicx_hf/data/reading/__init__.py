"""How training reads a cache, or a stream of images that is larger than the disk."""
