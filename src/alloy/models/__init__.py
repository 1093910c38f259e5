"""Level 2: modules, their configs and checkpoints; no training code."""
