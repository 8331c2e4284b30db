"""The exercises, solved. Try first."""
