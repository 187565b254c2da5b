"""One run in its own process, from its settings to its summary: ``run.py`` is its story."""
