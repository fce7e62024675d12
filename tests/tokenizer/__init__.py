"""Tests of `tidal.tokenizer`. Other tests may import `strategies.hostile_text`."""
