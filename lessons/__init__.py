"""How does one get from a scalar's derivative to all this? Ten programs that grade themselves."""
