"""The small world in which every part of PromptRL runs on a CPU: worlds, data, scorers, pretraining and base models."""
