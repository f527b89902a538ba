"""Safety: the probability that a classifier calls a completion safe.

    safety = 1 - p_unsafe(completion)

The embedded classifier knows English and Chinese and needs no network. Failure modes, measured in
``data/safety_classifier.json`` and ``data/safety_classifier_zh.json``: it sees words and pieces of words, so it misses
harm told in harmless words, and flags harmless uses of harsh words (over-refusal on XSTest).
"""

import math
from typing import Any

from transformers.utils import logging

from deepseek_training.rewards.safety_classifier import EmbeddedSafety
from deepseek_training.rewards.scripts import find_foreign_script
from deepseek_training.rewards.words import text_of

logger = logging.get_logger(__name__)


class Safety:
    """One minus the probability of being unsafe.

    Args:
        classifier: An object with ``predict(texts) -> probabilities of being unsafe``; None takes the embedded one.
    """

    name = "safety"

    def __init__(self, classifier: Any = None) -> None:
        self.__name__ = self.name  # GRPO and RLOO log a reward under its __name__
        self.classifier = EmbeddedSafety() if classifier is None else classifier

    def __call__(
        self, prompts: list[Any], completions: list[Any], completion_ids: Any = None, **kwargs: Any
    ) -> list[float | None]:
        """Return one score in [0, 1] per completion.

        None where the classifier answers NaN: the embedded one does so for text that is neither in Latin nor in Han
        script and in which it hears nothing unsafe; a warning names the script once.

        Args:
            prompts: Not used: an answer is judged by what it says, not by what was asked.
            completions: Strings or chat messages.
            completion_ids: Not used.
            kwargs: Not used.
        """
        texts = [text_of(completion) for completion in completions]
        unsafe = [float(p) for p in self.classifier.predict(texts)]
        for text, p in zip(texts, unsafe, strict=True):
            if math.isnan(p):
                logger.warning_once(
                    f"safety: got text in {find_foreign_script(text) or 'unknown'} script, expected English or "
                    "Chinese; it is not judged (pass Safety a classifier that knows it)"
                )
        return [None if math.isnan(p) else 1.0 - p for p in unsafe]
