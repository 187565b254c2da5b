"""One run in its own process, from its settings to its summary; start reading at ``run.py``."""
