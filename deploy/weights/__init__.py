"""Weights that the original policies were saved with."""
