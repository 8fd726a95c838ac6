"""Scores by prompt, and their bootstrap intervals."""
