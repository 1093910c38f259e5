"""Level 4: objectives, one file each. A loss is a set of sums with counts, so that a global mean can be formed later."""
