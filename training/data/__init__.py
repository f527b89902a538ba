"""Texts, their tokens, and the embedded data sets."""
