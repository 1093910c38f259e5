"""The cases: each module yields the problems of one family of operations."""
