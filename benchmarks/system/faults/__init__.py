"""Attacks on training, readers of files and the reward server: `python -m benchmarks.system.faults`."""
