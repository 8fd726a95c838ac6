"""Measures the small world's base models and trained agents."""
