"""Checkpoints from the hubs they are published on: what is needed, whether it fits, and how it comes whole."""
