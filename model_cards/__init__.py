"""Model cards and run folders: what a run wrote, read back and shown."""
