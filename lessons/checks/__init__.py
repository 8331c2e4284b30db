"""What an exercise has to pass, and which mistake gives which wrong number."""
