"""What to keep of a prompt: policies, put together from a scorer, a pooling, an allocation and a refit."""
