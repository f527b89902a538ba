"""Training of the indexer of sparse attention inside any transformers Trainer: DeepSeek-V3.2's and those after it."""

from deepseek_training.indexer.callback import IndexerTrainingCallback

__all__ = ["IndexerTrainingCallback"]
