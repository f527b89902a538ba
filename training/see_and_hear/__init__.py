"""Teaches a language model to see and hear: encoders, projectors, and the stage that trains them."""
