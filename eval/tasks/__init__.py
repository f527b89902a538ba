"""Benchmarks: one file of data and formatting each, listed in ``catalogue.py``."""
