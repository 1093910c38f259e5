"""alloy: one PyTorch toolkit for the whole life of an efficient language model."""

__version__ = "0.1.0.dev0"
