"""Checks before a run: what it would do on this machine, and what prevents it from starting."""
