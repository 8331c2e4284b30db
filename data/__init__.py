"""Which tokens each rank sees at each step. Knows nothing of models."""
