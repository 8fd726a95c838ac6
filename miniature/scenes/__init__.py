"""Scenes of coloured shapes: world, prompts, detector, rewards."""
