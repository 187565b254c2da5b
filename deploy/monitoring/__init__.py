"""Metrics: the catalogue, the endpoint, the history, trackers, and the bottleneck."""
