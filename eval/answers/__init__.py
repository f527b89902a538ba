"""How a model answers: likelihoods, continuations, generated text."""
