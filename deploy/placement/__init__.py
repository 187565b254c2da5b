"""Placement: which processes act and which learn, on the hardware there is."""
