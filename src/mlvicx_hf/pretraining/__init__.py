"""Self-supervised pretraining: arguments, views, the loop, checkpoints."""
