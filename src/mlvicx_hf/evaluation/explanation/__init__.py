"""Where a classifier looks: heat maps, drawn and scored."""
