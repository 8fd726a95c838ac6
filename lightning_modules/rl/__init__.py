"""Reinforcement learning in pure torch: transitions, schedules, advantages, losses, and log-probs as free functions."""
