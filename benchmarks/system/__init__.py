"""Measures speed, memory and numerics."""
