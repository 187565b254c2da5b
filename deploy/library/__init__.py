"""What ``import shoal`` offers to scripts and notebooks beside the networks: configurations, runs, trained policies."""
