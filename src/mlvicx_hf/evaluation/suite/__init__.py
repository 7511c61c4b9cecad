"""A grid of fine-tuning runs from one YAML file, its analysis and its report."""
