"""The DeepSeek-style Mixture-of-Experts model for transformers."""
