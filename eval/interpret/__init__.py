"""What experts and inputs contribute: what an expert takes, what is lost without it, what drove a prediction."""
