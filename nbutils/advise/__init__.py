"""Advice on batch size for a reader's own classifier."""
