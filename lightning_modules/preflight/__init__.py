"""Estimates memory before weights are loaded."""
