"""What pretraining minimises, one module a method."""
