"""Batched completions with stop strings, greedy or sampled, as the references cut them.

Called by ``harness.py`` for programming tasks. Prompts are padded on the left; a prompt that leaves no room for
``max_new_tokens`` loses tokens from the left, as in lm-evaluation-harness 0.4.13. A row is finished once a stop string
shows up in its text, whatever tokens spell it, and the text is cut at the first one. Sampling is seeded per batch and
batches depend on the prompts alone, so an interrupted run that goes on writes the same completions.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from deepseek_eval.model_loading import LoadedModel
from deepseek_eval.served_model import MAX_STOPS, ServedModel
from deepseek_eval.tasks.task import ProgramItem
from deepseek_records.user_text import encode


@dataclass(frozen=True)
class SamplingSettings:
    """How completions are drawn.

    Args:
        max_new_tokens: Length limit in tokens.
        num_samples: Completions per problem.
        temperature: 0 is greedy.
        top_p: Nucleus share, for sampling.
        seed: Seed, for sampling.
    """

    max_new_tokens: int = 1024
    num_samples: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class EncodedPrompt:
    """One completion to write.

    Args:
        item: The problem.
        sample: Which of its samples, from 0.
        token_ids: The prompt, cut to leave room.
        is_truncated: Whether the prompt lost tokens.
    """

    item: ProgramItem
    sample: int
    token_ids: list[int]
    is_truncated: bool


def plan_prompts(
    loaded: LoadedModel, items: Sequence[ProgramItem], settings: SamplingSettings, batch_size: int
) -> list[tuple[EncodedPrompt, ...]]:
    """Encode the prompts and group them into batches of similar length, longest first.

    Args:
        loaded: Model and tokenizer.
        items: The problems.
        settings: How many samples, how long.
        batch_size: At most this many prompts per batch.

    Raises:
        ValueError: The context leaves no room for a prompt.
    """
    room = loaded.max_length - settings.max_new_tokens
    if room <= 0:
        raise ValueError(
            f"max_new_tokens = {settings.max_new_tokens} leaves no room for a prompt in a context of "
            f"{loaded.max_length} tokens, expected 1 to {loaded.max_length - 1}"
        )
    prompts = []
    for item in items:
        token_ids = encode_prompt(loaded.tokenizer, item.prompt)
        for sample in range(settings.num_samples):
            prompts.append(EncodedPrompt(item, sample, token_ids[-room:], len(token_ids) > room))
    prompts.sort(key=lambda prompt: -len(prompt.token_ids))
    return [tuple(prompts[start : start + batch_size]) for start in range(0, len(prompts), batch_size)]


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Return a prompt's tokens, with one beginning-of-text token where the tokenizer adds it.

    A chat template may have written that token itself; then the tokenizer must not add a second one.

    Args:
        tokenizer: The model's.
        prompt: Raw text, or a rendered chat, whose contents are protected (`deepseek_records.user_text`).
    """
    starts_itself = bool(tokenizer.bos_token) and prompt.startswith(tokenizer.bos_token)
    return encode(prompt, tokenizer, add_special_tokens=not starts_itself)


class _StopAtStrings(StoppingCriteria):
    """Marks rows whose new text holds a stop string, and reports each step."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stops: Sequence[tuple[str, ...]],
        prompt_width: int,
        on_step: Callable[[], None],
    ) -> None:
        self.tokenizer = tokenizer
        self.stops = stops
        self.prompt_width = prompt_width
        self.on_step = on_step
        # Each token adds at least one byte and a character has at most four, so this many last tokens cover any stop
        # string that ends in the newest token. Two more, for tokens cut inside a character.
        self.lookback = 2 + max((len(stop.encode()) for row in stops for stop in row), default=0)
        self.is_done = torch.zeros(len(stops), dtype=torch.bool)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> torch.BoolTensor:
        self.on_step()
        new = input_ids[:, self.prompt_width :][:, -self.lookback :]
        running = (~self.is_done).nonzero().flatten().tolist()
        for row, text in zip(running, self.tokenizer.batch_decode(new[running]), strict=True):
            self.is_done[row] = any(stop in text for stop in self.stops[row])
        return self.is_done.to(input_ids.device)


class _RefuseNaN(LogitsProcessor):
    """Stops at logits that mean nothing; greedy decoding would go on with token 0, sampling die of a tensor error."""

    def __init__(self, batch: Sequence[EncodedPrompt]) -> None:
        self.batch = batch

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        is_bad = (scores.isnan() | scores.isposinf()).any(dim=-1)
        if is_bad.any():
            name = self.batch[int(is_bad.nonzero()[0])].item.id
            raise ValueError(f"model: the logits of problem {name} are NaN or infinite; its completions mean nothing")
        return scores


def complete_batches(
    loaded: LoadedModel,
    batches: Iterable[tuple[EncodedPrompt, ...]],
    settings: SamplingSettings,
    on_step: Callable[[], None] = lambda: None,
) -> Iterator[tuple[EncodedPrompt, str]]:
    """Yield each prompt with its completion, batch by batch.

    Args:
        loaded: Model and tokenizer.
        batches: From `plan_prompts`.
        settings: How completions are drawn.
        on_step: Called after each generated position.

    Raises:
        ValueError: The model returns NaN or infinity.
    """
    for batch in batches:
        for prompt, text in zip(batch, _complete(loaded, batch, settings, on_step), strict=True):
            yield prompt, cut_at_stop(text, prompt.item.stop)


def cut_at_stop(text: str, stops: Iterable[str]) -> str:
    """Return the text before the first stop string.

    Args:
        text: A completion.
        stops: Strings that end it.
    """
    for stop in stops:
        text = text.split(stop)[0]
    return text


@torch.inference_mode()
def _complete(
    loaded: LoadedModel, batch: tuple[EncodedPrompt, ...], settings: SamplingSettings, on_step: Callable[[], None]
) -> list[str]:
    if isinstance(loaded.model, ServedModel):
        return list(loaded.model.complete(_request(prompt, settings) for prompt in batch))
    tokenizer, device = loaded.tokenizer, loaded.model.device
    width = max(len(prompt.token_ids) for prompt in batch)
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    gaps = [width - len(prompt.token_ids) for prompt in batch]
    input_ids = torch.tensor([[pad_id] * gap + p.token_ids for gap, p in zip(gaps, batch, strict=True)], device=device)
    mask = torch.tensor([[0] * gap + [1] * (width - gap) for gap in gaps], device=device)
    criterion = _StopAtStrings(tokenizer, [prompt.item.stop for prompt in batch], width, on_step)
    torch.manual_seed(_batch_seed(batch, settings.seed))
    output = loaded.model.generate(
        input_ids=input_ids,
        attention_mask=mask,
        generation_config=_generation_config(loaded, settings, pad_id),
        logits_processor=LogitsProcessorList([_RefuseNaN(batch)]),
        stopping_criteria=StoppingCriteriaList([criterion]),
    )
    return tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)


def _request(prompt: EncodedPrompt, settings: SamplingSettings) -> dict[str, Any]:
    """A completion's fields; each sample is drawn by a seed of its own."""
    stops = {"stop": list(prompt.item.stop[:MAX_STOPS])} if prompt.item.stop else {}
    return {
        "prompt": prompt.token_ids,
        "max_tokens": settings.max_new_tokens,
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "seed": settings.seed + prompt.sample,
        **stops,
    }


def _generation_config(loaded: LoadedModel, settings: SamplingSettings, pad_id: int) -> GenerationConfig:
    """Greedy or sampled, without the checkpoint's own taste in sampling; only its end tokens are taken over."""
    end_ids = loaded.model.generation_config.eos_token_id
    sampling = {}
    if settings.temperature > 0:
        sampling = {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": 0}
    return GenerationConfig(
        max_new_tokens=settings.max_new_tokens,
        do_sample=settings.temperature > 0,
        pad_token_id=pad_id,
        eos_token_id=end_ids if end_ids is not None else loaded.tokenizer.eos_token_id,
        use_cache=True,
        **sampling,
    )


def _batch_seed(batch: tuple[EncodedPrompt, ...], seed: int) -> int:
    names = "\n".join(f"{prompt.item.id}#{prompt.sample}" for prompt in batch)
    return int.from_bytes(hashlib.sha256(f"{seed}\n{names}".encode()).digest()[:4], "big")
