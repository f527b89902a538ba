"""Evaluation: benchmark tasks, metrics, the code sandbox and their reports."""
