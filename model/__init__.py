"""What GPT-2 is, how its weights change, and where they live on disk. Knows nothing of data."""
