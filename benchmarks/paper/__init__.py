"""Repeats the paper's comparisons in the small world."""
