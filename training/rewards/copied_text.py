"""What a completion copies from its prompt: the prompt itself, which earns nothing, or a text the prompt gives.

`deepseek_training.rewards.relevance` asks both. "The question is: ..." and praise before an echo bring new
words, so a guard that counts new words alone lets the echo pass; and a corrected, sorted or shortened text hardly has
any, though that is what was asked for.
"""

from deepseek_training.rewards.words import (
    FUNCTION_WORDS,
    content_words,
    find_words,
    has_form_of,
    ngrams,
    split_sentences,
    split_words,
    stem,
)

RUN_WORDS, QUOTED_SHARE = 3, 0.9
NAMED_SHARE = 1 / 3  # of a sentence's content words; an answer that names no more leaves the sentence out


def without_quoted_prompt(asked: str, answered: str) -> str:
    """Return the completion without the prompt, where it repeats the prompt whole, else as it is.

    Whole means that runs of three words and more cover nine tenths of the prompt's words; what lies in such runs is
    taken out. A prompt of fewer words than a run is its subject's name and stays.

    Args:
        asked: The prompt.
        answered: The completion.
    """
    prompt, spans = split_words(asked), find_words(answered)
    words = [word for word, _, _ in spans]
    shared = set(ngrams(prompt, RUN_WORDS)) & set(ngrams(words, RUN_WORDS))
    is_copied, is_repeated = _mark_runs(words, shared), _mark_runs(prompt, shared)
    if not prompt or sum(is_repeated) < QUOTED_SHARE * len(prompt):
        return answered
    kept, end = [], 0
    for (_, start, stop), copied, follows in zip(spans, is_copied, [False, *is_copied[:-1]], strict=True):
        if copied:
            kept.append("" if follows else answered[end:start])
            end = stop
    return "".join([*kept, answered[end:]])


def _mark_runs(words: list[str], runs: set[tuple[str, ...]]) -> list[bool]:
    """Which words lie in one of the runs."""
    marks = [False] * len(words)
    for i, run in enumerate(ngrams(words, RUN_WORDS)):
        if run in runs:
            marks[i : i + RUN_WORDS] = [True] * RUN_WORDS
    return marks


def treats_given_text(asked: str, answered: str) -> bool:
    """Return whether the completion leaves out a sentence of the prompt, so it may be the other's text treated.

    Of "Correct this: I goes home." an answer names the second sentence (a colon ends one) and not the first; an echo
    names both.

    Args:
        asked: The prompt.
        answered: The completion.
    """
    sentences = [_content_forms(part) for part in split_sentences(asked, at_colons=True)]
    sentences = [forms for forms in sentences if forms]
    said = set(split_words(answered))
    named = set(content_words(said))
    return len(sentences) > 1 and any(
        sum(root in named or has_form_of(word, said) for root, word in forms.items()) <= NAMED_SHARE * len(forms)
        for forms in sentences
    )


def _content_forms(text: str) -> dict[str, str]:
    """The content words of a text, one form of each stem."""
    return {stem(word): word for word in split_words(text) if word not in FUNCTION_WORDS}
