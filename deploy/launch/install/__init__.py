"""Code that runs before anything is installed: standard library only, called by the Makefile."""
