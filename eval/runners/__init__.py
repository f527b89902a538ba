"""What runs a task: one file per kind of item."""
