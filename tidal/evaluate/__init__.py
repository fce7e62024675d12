"""Figures of a trained model: exact match on sums, bits per byte on text."""
