"""One file a training command: its Recipe and its Task."""
