"""PromptRL on Lightning: joint reinforcement learning of a prompt refiner and a flow-matching image model."""
