"""Is the model any good? Knows nothing of how it was trained."""
