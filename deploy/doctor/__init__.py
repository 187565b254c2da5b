"""Checks before a run: what it would do on this machine, and what is in its way."""
