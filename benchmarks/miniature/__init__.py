"""Measurements of the miniature's base models and trained agents."""
