"""Level 2: documents, tokens and batches. Knows tokenizers, not models."""
