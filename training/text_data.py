"""Reading of texts under its name of 0.1.0; it lives in ``deepseek_training.data.texts``."""

from deepseek_training.data.texts import load_texts

__all__ = ["load_texts"]
