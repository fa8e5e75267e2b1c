"""Frozen layers and what they are worth: rotation accuracy, k-NN, probes, and their report."""
