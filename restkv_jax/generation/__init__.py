"""Generation: prompts are read into a cache, then tokens are decoded on it."""
