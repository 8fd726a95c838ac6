"""Vision-language models as judges, behind OpenAI-compatible servers."""
