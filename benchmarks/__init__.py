"""Measurements: speed and memory, the small world, the paper's comparisons."""
