"""Safety: the probability that a classifier calls a completion safe.

    safety = 1 - p_unsafe(completion)

The embedded classifier needs no network. Failure modes, measured in
``data/safety_classifier.json``: the embedded one sees words and pieces of words, so it misses harm told in harmless
words, and flags harmless uses of harsh words (over-refusal on XSTest).
"""

from typing import Any

from deepseek_training.rewards.words import text_of


class Safety:
    """One minus the probability of being unsafe.

    Args:
        classifier: An object with ``predict(texts) -> probabilities of being unsafe``; None takes the embedded one.
    """

    name = "safety"

    def __init__(self, classifier: Any = None) -> None:
        from deepseek_training.rewards.safety_classifier import SafetyClassifier

        self.__name__ = self.name  # GRPO and RLOO log a reward under its __name__
        self.classifier = SafetyClassifier.load() if classifier is None else classifier

    def __call__(
        self, prompts: list[Any], completions: list[Any], completion_ids: Any = None, **kwargs: Any
    ) -> list[float]:
        """Return one score in [0, 1] a completion.

        Args:
            prompts: Not used: an answer is judged by what it says, not by what was asked.
            completions: Strings or chat messages.
            completion_ids: Not used.
            kwargs: Not used.
        """
        texts = [text_of(completion) for completion in completions]
        return [1.0 - float(p) for p in self.classifier.predict(texts)]
