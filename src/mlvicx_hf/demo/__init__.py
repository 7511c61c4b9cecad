"""The rooms below, put together."""
