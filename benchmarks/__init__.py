"""Benchmarks: each checks its result before timing it and ends in one JSON line."""
