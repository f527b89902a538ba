"""Toxic documents, by the embedded safety classifiers of the rewards.

A document is judged by the share of its sentences that are unsafe: one quotation, or one false alarm, in a long text
does not drop it.
"""

import functools

from deepseek_training.rewards.safety_classifier import EmbeddedSafety, split_stretches

_UNSAFE = 0.6
# Sentences that are looked at, evenly spaced; a long text takes no longer than a page.
_MOST_SENTENCES = 10


@functools.cache
def _classifiers() -> EmbeddedSafety:
    return EmbeddedSafety()


def unsafe_share(text: str) -> float:
    """Return the share of a text's sentences that are unsafe.

    Args:
        text: The text.
    """
    stretches = [words for words in split_stretches(text) if words]
    step = max(1, -(-len(stretches) // _MOST_SENTENCES))
    chosen = stretches[::step]
    if not chosen:
        return 0.0
    unsafe = _classifiers()
    return sum(unsafe.predict_stretch(words) > _UNSAFE for words in chosen) / len(chosen)
