"""Documents that European law asks of a model's provider, filled from run folders and the provider's own answers."""
