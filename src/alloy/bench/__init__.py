"""Measurements against named peers and against the machine's own limits (`alloy bench`)."""
