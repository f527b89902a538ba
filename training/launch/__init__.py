"""What a stage is about to do and what it needs, before it does it; and the files that start several processes."""
