"""Watching a served model: its load, its experts and its answers against those at release; `deepseek-moe monitor`."""
