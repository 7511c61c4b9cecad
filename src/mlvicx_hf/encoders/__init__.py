"""Whatever turns images into features: saved models, start weights, other libraries' weights."""
