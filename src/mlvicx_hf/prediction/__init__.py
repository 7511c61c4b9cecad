"""A saved model on image files."""
