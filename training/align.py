"""Encoding of prompts under its name of 0.1.0; it lives in ``deepseek_training.data.prompts``."""

from deepseek_training.data.prompts import encode_prompt

__all__ = ["encode_prompt"]
