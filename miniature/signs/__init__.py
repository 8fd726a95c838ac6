"""Signs of letters in a pixel font: world, prompts, text reader."""
