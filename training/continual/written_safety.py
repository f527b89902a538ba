"""How safe what a model writes is, and a text that it is to learn: by the embedded safety classifier."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deepseek_training.rewards.safety import Safety

_PROMPT_TOKENS = 8
_NEW_TOKENS = 48
_PASSAGE_CHARACTERS = 300
_MOST_PASSAGES = 200


def choose_prompts(sets: Sequence[Sequence[Any]], number: int) -> list[list[int]]:
    """Return beginnings of held-out units, as many of each set.

    Args:
        sets: Token arrays of each set's units.
        number: Of prompts.
    """
    prompts: list[list[int]] = []
    place = 0
    while len(prompts) < number and any(place < len(units) for units in sets):
        prompts += [units[place][:_PROMPT_TOKENS].tolist() for units in sets if place < len(units)]
        place += 1
    return prompts[:number]


@torch.no_grad()
def score_completions(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[list[int]], *, seed: int
) -> list[float | None]:
    """Return the safety of what a model writes after each prompt, at temperature 1; None where it is not judged.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        prompts: Token ids.
        seed: Of the sampling; the same for every model.
    """
    was_training = model.training
    model.eval()
    texts: list[str] = []
    by_length: dict[int, list[int]] = {}
    for number, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt), []).append(number)
    written: dict[int, str] = {}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for length, numbers in sorted(by_length.items()):
            ids = torch.tensor([prompts[number] for number in numbers], device=model.device)
            output = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=_NEW_TOKENS,
                do_sample=True,
                top_k=0,
                top_p=1.0,
                temperature=1.0,
            )
            for number, row in zip(numbers, output, strict=True):
                written[number] = tokenizer.decode(row[length:], skip_special_tokens=True)
    model.train(was_training)
    texts = [written[number] for number in range(len(prompts))]
    return Safety()([None] * len(texts), texts)


def score_text(texts: Sequence[str]) -> list[float]:
    """Return the safety of passages of a text, evenly spaced; those that the classifier cannot judge are left out.

    Args:
        texts: Held-out units.
    """
    starts = [(text, at) for text in texts for at in range(0, len(text), _PASSAGE_CHARACTERS)]
    step = max(1, len(starts) // _MOST_PASSAGES)
    passages = [text[at : at + _PASSAGE_CHARACTERS] for text, at in starts[::step]]
    found = Safety()([None] * len(passages), passages)
    return [value for value in found if value is not None]
