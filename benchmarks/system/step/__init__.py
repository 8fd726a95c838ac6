"""What a joint step costs over its own network calls, and against a plain recipe."""
