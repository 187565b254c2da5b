"""Playing episodes with trained weights: on request, against others, and during training."""
