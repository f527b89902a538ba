"""One model behind transformers' continuous batching: requests go in as token ids, tokens come out as they are chosen.

`app.py` calls it from the server's event loop; the model runs in the manager's own thread. The engine adds what the
manager leaves to its caller: a bounded queue, a time limit, an end for a request whose reader has gone, and an end in
order.
"""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from transformers import ContinuousBatchingConfig, GenerationConfig, LogitsProcessorList, PreTrainedModel
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessorList
from transformers.generation.continuous_batching.requests import GenerationOutput

from deepseek_serving.monitoring.routing_counts import RoutingCounts, Rows, Take
from deepseek_serving.openai_endpoint.latent_cache import use_latent_pages
from deepseek_serving.openai_endpoint.prompt_logprobs import PromptLogprobs, PromptRecord
from deepseek_serving.openai_endpoint.refusals import RequestRefusedError
from deepseek_serving.openai_endpoint.sampling import RequestSampler, SamplingSettings

PAGE_SIZE = 16


@dataclass(frozen=True)
class Limits:
    """What one server takes on.

    Attributes:
        context: Tokens of prompt and answer together.
        max_tokens: Tokens of an answer.
        max_running: Requests in one batch.
        max_waiting: Requests beside those; the next one is refused.
        timeout_s: From a request's arrival to its last token.
        cache_tokens: Tokens of all requests in the cache; requests beyond it wait, or are read again later.
        max_batch_tokens: Tokens of one forward pass: longer prompts are read in parts.
        max_body_bytes: Of one HTTP request.
    """

    context: int
    max_tokens: int = 1024
    max_running: int = 16
    max_waiting: int = 64
    timeout_s: float = 300.0
    cache_tokens: int = 16384
    max_batch_tokens: int = 512
    max_body_bytes: int = 1_000_000


class Engine:
    """Runs one model for many requests at once.

    A context manager: the thread with the model lives inside it.

    Args:
        model: In evaluation mode; attention `sdpa`.
        limits: What is taken on.
        is_counted: Whether what the routers choose is counted.

    Attributes:
        routing: The counts; None without them, and before the start.

    Raises:
        ValueError: The model's attention is of a kind that cannot be served.
    """

    def __init__(self, model: PreTrainedModel, limits: Limits, *, is_counted: bool = True) -> None:
        self.model = model
        self.is_counted = is_counted
        self.routing: RoutingCounts | None = None
        self.limits = limits
        self.has_latents = use_latent_pages(model)
        ends = model.generation_config.eos_token_id
        self.end_tokens = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
        self._live: dict[str, asyncio.Queue[GenerationOutput | None]] = {}
        self._is_draining = False
        self._manager: Any = model.init_continuous_batching(
            GenerationConfig(do_sample=False, max_new_tokens=limits.max_tokens, eos_token_id=self.end_tokens or -1),
            ContinuousBatchingConfig(
                page_size=PAGE_SIZE,
                num_blocks=self._count_blocks(),
                max_batch_tokens=limits.max_batch_tokens,
                max_requests_per_batch=limits.max_running,
                max_memory_percent=0.9,
                max_blocks_per_request=0,  # the block tables of flash attention, which latent pages do not have
                use_async_batching=False,
                use_cuda_graph=False,
                auto_switch_to_flash=False,
            ),
        )
        self._prompts = PromptLogprobs(model, self._rows_of_pass)
        self._sampler = RequestSampler()
        processors = LogitsProcessorList([self._sampler])
        self._manager.logit_processor = ContinuousBatchingLogitsProcessorList(processors)
        self._manager.logit_processor.tensors_required = 1

    def __enter__(self) -> "Engine":
        """Start, and have one token made: a model that cannot be served is told now, not to the first reader."""
        self._manager.start()
        try:
            self._try_one_token()
        except BaseException:
            self.__exit__()
            raise
        self._read_scored_prompts_whole()
        if self.is_counted:
            self.routing = RoutingCounts(self.model, self._rows_of_pass)
        return self

    def __exit__(self, *_: object) -> None:
        if self.routing is not None:
            self.routing.detach()
        self._prompts.detach()
        self._manager.stop(block=True, timeout=30, hard_stop=True)

    @property
    def num_live(self) -> int:
        """Requests that are running or waiting."""
        return len(self._live)

    @property
    def num_running(self) -> int:
        """Requests in the batch."""
        processor = self._manager.batch_processor
        return 0 if processor is None else len(processor.scheduler.active_requests)

    @property
    def failure(self) -> str | None:
        """Why nothing more can be generated; None while all is well."""
        if self._manager.is_running() and self._manager.background_thread_status.fatal_error is None:
            return None
        error = self._manager.background_thread_status.fatal_error
        return type(error).__name__ if error is not None else "the model's thread has ended"

    def submit(
        self, prompt_ids: list[int], settings: SamplingSettings, max_tokens: int, *, is_scored: bool = False
    ) -> "Generation":
        """Take on a request; the caller must close what is returned.

        Args:
            prompt_ids: At least one token.
            settings: How tokens are chosen.
            max_tokens: At most this many are made.
            is_scored: Whether the prompt's own log-probabilities are read.

        Raises:
            RequestRefusedError: The queue is full or the server ends (503), or the model's thread has failed (500).
        """
        if self._is_draining:
            raise RequestRefusedError(503, "the server is shutting down", code="shutting_down")
        if self.num_live >= self.limits.max_running + self.limits.max_waiting:
            raise RequestRefusedError(
                503, f"the queue is full ({self.num_live} requests); try again", code="queue_full"
            )
        if self.failure is not None:
            raise RequestRefusedError(500, "the model has stopped", code="engine_failed")
        request_id = uuid.uuid4().hex
        outputs: asyncio.Queue[GenerationOutput | None] = asyncio.Queue()
        self._live[request_id] = outputs
        if self.routing is not None:
            self.routing.begin(request_id)
        record = self._prompts.begin(request_id, prompt_ids, settings.num_top) if is_scored else None
        self._manager.register_result_handler(request_id, outputs.put_nowait)
        self._manager.add_request(
            prompt_ids,
            request_id,
            max_new_tokens=max_tokens,
            streaming=True,
            eos_token_id=self.end_tokens or -1,
            sampling=settings,
        )
        return Generation(self, request_id, outputs, record)

    def keep_log_probs(self) -> None:
        """Add the written tokens' log-probabilities to each request's counts."""
        assert self.routing is not None
        self._sampler.on_written = self.routing.write

    def drain(self) -> None:
        """Refuse new requests from now on."""
        self._is_draining = True

    def abort(self) -> None:
        """End what still runs, with a refusal to each reader; to be called in the event loop."""
        self._is_draining = True
        for outputs in self._live.values():
            outputs.put_nowait(None)

    def release(self, request_id: str, *, is_finished: bool, take: Take | None = None) -> None:
        """Forget a request, and stop its work where it is not finished.

        Args:
            request_id: From `submit`; one that is forgotten already is passed over.
            is_finished: Whether its last token has come.
            take: Called with the request's counts; None where they are of no use.
        """
        if self._live.pop(request_id, None) is None:
            return
        self._prompts.end(request_id)
        if self.routing is not None:
            self.routing.end(request_id, take)
        if not is_finished:
            self._manager.cancel_request(request_id)
            self._manager.output_router.result_handlers.pop(request_id, None)

    def _rows_of_pass(self) -> Rows:
        requests = self._manager.batch_processor.inputs_and_outputs.requests_in_batch
        return [(request.state.request_id, request.query_length) for request in requests]

    def _read_scored_prompts_whole(self) -> None:
        """Have a prompt that is scored read from its first token, though its beginning may be in the cache."""
        cache = self._manager.batch_processor.cache
        search = cache.search_prefix_match
        cache.search_prefix_match = lambda name, ids: 0 if name in self._prompts else search(name, ids)

    def _count_blocks(self) -> int:
        """`cache_tokens` in the manager's unit: blocks of pages as full attention would have them."""
        config = self.model.config.get_text_config()
        heads = config.num_attention_heads if config.num_key_value_heads is None else config.num_key_value_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        row = config.kv_lora_rank + config.qk_rope_head_dim if self.has_latents else 2 * heads * head_dim
        num_rows = self.limits.cache_tokens + PAGE_SIZE * self.limits.max_running  # each ends in a page of its own
        return max(1, -(-num_rows * row // (PAGE_SIZE * 2 * heads * head_dim)))

    def _try_one_token(self) -> None:
        self._manager.add_request([0], "first", max_new_tokens=1, eos_token_id=-1, sampling=SamplingSettings(0))
        while self.failure is None:
            output = self._manager.get_result(timeout=0.2)
            if output is not None and output.error is None:
                return
            if output is not None:
                break
        error = self._manager.background_thread_status.fatal_error
        if isinstance(error, MemoryError):
            raise MemoryError(f"{error}; --cache-tokens and --max-batch-tokens make it less")
        reason = " ".join(str(error or output.error).split())[:300]
        raise ValueError(
            f"model: {type(self.model).__name__} cannot be served: transformers' continuous batching fails at it "
            f"({reason}); deepseek-moe generate runs it without a server"
        )


class Generation:
    """One request's tokens, as they come.

    Args:
        engine: Where it runs.
        request_id: Its name there.
        outputs: What the engine's thread fills.
        prompt_record: Of the prompt's tokens, one each; None where it is not scored.

    Attributes:
        is_finished: Whether the last token has come.
        take: Called with the request's counts at the end; for the engine's caller to set.
    """

    def __init__(
        self,
        engine: Engine,
        request_id: str,
        outputs: "asyncio.Queue[GenerationOutput | None]",
        prompt_record: PromptRecord | None = None,
    ) -> None:
        self.engine = engine
        self.request_id = request_id
        self.outputs = outputs
        self.prompt_record = prompt_record
        self.is_finished = False
        self.take: Take | None = None
        self._ends_at = time.monotonic() + engine.limits.timeout_s

    async def tokens(self) -> AsyncIterator[list[int]]:
        """Yield new token ids, one or more at a time, up to the last.

        Raises:
            RequestRefusedError: The time is over (504), the server ends (503) or the model failed (500).
        """
        num_seen = 0
        while not self.is_finished:
            try:
                output = await asyncio.wait_for(self.outputs.get(), max(0.0, self._ends_at - time.monotonic()))
            except TimeoutError:
                limit = self.engine.limits.timeout_s
                raise RequestRefusedError(504, f"not done within {limit:g} s", code="timeout") from None
            if output is None:
                raise RequestRefusedError(503, "the server is shutting down", code="shutting_down")
            if output.error is not None:
                raise RequestRefusedError(500, "the model failed at this batch", code="engine_failed")
            self.is_finished = output.is_finished()
            new, num_seen = output.generated_tokens[num_seen:], len(output.generated_tokens)
            if new:
                yield new

    def close(self) -> None:
        """Give the place back; what is not finished is no longer computed."""
        self.engine.release(self.request_id, is_finished=self.is_finished, take=self.take)
