"""Level 7: the one training loop, its optimizers, its checkpoints, and one task a training command."""
