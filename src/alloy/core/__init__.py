"""Level 0: recipes, registries, run directories, logging, reports. Knows nothing of models, data or training."""
