"""What ``shoal bench learn`` is made of: environments with thresholds, how they are trained, and what is told of it."""
