"""Edits of scenes whose instructions need the source image: world, instructions, rewards."""
