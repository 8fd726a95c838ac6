"""Data modules: prompts with the metadata that their rewards need (contracts in `datamodules.base`)."""
