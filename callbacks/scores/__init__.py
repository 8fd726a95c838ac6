"""Scores by prompt, and their intervals."""
