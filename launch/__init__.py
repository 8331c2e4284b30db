"""How a run is started, watched and survived. Knows nothing of models or data."""
