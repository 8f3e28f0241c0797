"""Loads a model by any name and lets questions fork from what it has read."""
