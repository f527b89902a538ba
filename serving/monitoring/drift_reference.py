"""The reference that drift is measured against: what requests left behind at release, with the model's hash."""

import asyncio
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from deepseek_records.hashes import hash_model
from deepseek_serving.monitoring.request_counts import FinishedRequest, RequestTable, make_table
from deepseek_serving.monitoring.routing_counts import RequestCounts
from deepseek_serving.openai_endpoint.engine import Engine
from deepseek_serving.openai_endpoint.sampling import SamplingSettings

FILE_NAME = "drift_reference.npz"
MIN_REQUESTS = 2000


def answer_all(
    engine: Engine, prompts: Sequence[list[int]], max_tokens: int, on_done: Callable[[], object] = lambda: None
) -> RequestTable:
    """Answer prompts as the server would, and return what they leave behind.

    Args:
        engine: Started, with counts; what is drawn has temperature 1 and the prompt's place as seed.
        prompts: Token ids.
        max_tokens: Of each answer.
        on_done: Called after each.
    """
    assert engine.routing is not None
    engine.keep_log_probs()
    finished: list[FinishedRequest] = []
    asyncio.run(_answer_all(engine, prompts, max_tokens, finished, on_done))
    engine.routing.flush()
    return make_table(finished, hash_model(engine.model), engine.routing.names, engine.routing.sizes)


async def _answer_all(
    engine: Engine,
    prompts: Sequence[list[int]],
    max_tokens: int,
    finished: list[FinishedRequest],
    on_done: Callable[[], object],
) -> None:
    places = asyncio.Semaphore(engine.limits.max_running)

    def take(ids: list[int], written: list[int], counts: RequestCounts) -> None:
        is_cut = len(written) == max_tokens and written[-1] not in engine.end_tokens
        log_prob = counts.log_prob / max(1, counts.num_written)
        token_ids = np.array([*ids, *written])
        finished.append(FinishedRequest(token_ids, len(written), is_cut, log_prob, counts.expert_tokens, time.time()))

    async def answer(seed: int, ids: list[int]) -> None:
        async with places:
            generation = engine.submit(ids, SamplingSettings(seed), max_tokens)
            written = [token async for new in generation.tokens() for token in new]
            generation.take = partial(take, ids, written)
            generation.close()
            on_done()

    await asyncio.gather(*(answer(seed, ids) for seed, ids in enumerate(prompts)))


def load_reference(path: Path, model_hash: str | None = None) -> RequestTable:
    """Return a reference.

    Args:
        path: The file.
        model_hash: Of the model that is watched; None does not ask.

    Raises:
        FileNotFoundError: It is not there.
        ValueError: It is of another model, or another kind of file.
    """
    if not path.exists():
        raise FileNotFoundError(
            f"reference: {path} is not there; deepseek-moe monitor reference MODEL --data TEXTS writes it"
        )
    reference = RequestTable.load(path)
    if model_hash is not None and reference.model_hash != model_hash:
        raise ValueError(
            f"reference: {path} is of another model (weights {reference.model_hash[:12]}, not {model_hash[:12]}); "
            "deepseek-moe monitor reference MODEL --data TEXTS writes one for this model"
        )
    return reference
