"""Cleaning a folder of text before training: one file for each filter, joined by `passes.py`."""
