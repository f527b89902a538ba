"""One `evaluate` metric, loaded by folder."""
