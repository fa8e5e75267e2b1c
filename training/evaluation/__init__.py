"""Frozen layers and fine-tuned networks, measured with labels."""
