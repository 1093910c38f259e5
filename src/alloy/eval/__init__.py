"""Level 6: measurements of models."""
