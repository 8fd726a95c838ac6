"""Data: prompts with what their rewards need to know (contracts in `datamodules.base`)."""
