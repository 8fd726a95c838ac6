"""Rewards: each scores images against their original prompts (contracts in `rewards.base`)."""
