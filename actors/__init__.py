"""Rollout workers that make trajectories, and the pools that run them and replace those that fail."""
