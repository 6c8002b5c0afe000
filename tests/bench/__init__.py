"""Benchmarks: ratios against something run side by side, never absolute times."""
