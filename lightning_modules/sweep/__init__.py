"""Sweeps: many experiments, side by side and restartable (`python -m lightning_modules.sweep`)."""
