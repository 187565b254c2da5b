"""The composition root: command line, root configuration, launch modes, and what is deployed."""
