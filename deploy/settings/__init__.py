"""The root configuration: its sections, and how it is read."""
