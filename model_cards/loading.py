"""Loading of models and tokenizers under its documented name; it lives in ``deepseek_records.loading``."""

from deepseek_records.loading import load_model, load_tokenizer

__all__ = ["load_model", "load_tokenizer"]
