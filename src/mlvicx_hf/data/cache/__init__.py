"""Prepared caches: made from the files of a collection, opened for training, shared on the Hub."""
