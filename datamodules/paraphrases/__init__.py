"""Paraphrases of evaluation prompts, and checks that they still ask for the same (contracts in `base`)."""
