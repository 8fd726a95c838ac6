"""Reinforcement learning in pure torch, as free functions: sampling, transitions, advantages, losses, log-probs."""
