"""The reward server and its client."""
