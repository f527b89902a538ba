"""Side-by-side measurements behind `deepseek-moe bench`."""
