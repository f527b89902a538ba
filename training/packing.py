"""Packed documents under their name of 0.1.0; they live in ``deepseek_training.data.packing``."""

from deepseek_training.data.packing import PackedDataset, encode_documents

__all__ = ["PackedDataset", "encode_documents"]
