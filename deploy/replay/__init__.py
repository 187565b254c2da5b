"""`shoal replay`: recorded updates, listed or made again."""
