"""One image: its file, its pixels, its square in a cache."""
