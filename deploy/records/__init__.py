"""Files of the run directory."""
