"""Making models smaller: cut from a larger one, and taught by it."""
