"""Turn images into features: saved models, initial weights, weights of other libraries."""
