"""Programs that use shoal as a library; copy one and change it. Each takes settings: ``python FILE.py mode=inline``."""
