"""Models for other engines: exports and what they need."""
