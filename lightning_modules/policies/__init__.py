"""The two agents: language models that rewrite prompts and flow models that draw them."""
