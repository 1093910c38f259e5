"""The stages, one file each, named like their commands."""
