"""One request that is being answered: its texts as they come, whole or as server-sent events.

`app.py` makes a `Reply` of each request, with an `Answer` for each of its `n`.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from functools import partial
from typing import Any, Protocol

import numpy as np
from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from transformers import PreTrainedTokenizerBase

from deepseek_serving.monitoring.request_log import log_request
from deepseek_serving.openai_endpoint.answers import Form, Usage, event
from deepseek_serving.openai_endpoint.engine import Engine, Generation
from deepseek_serving.openai_endpoint.metrics import Metrics
from deepseek_serving.openai_endpoint.refusals import RequestRefusedError
from deepseek_serving.openai_endpoint.request_fields import ChatRequest, GenerationRequest
from deepseek_serving.openai_endpoint.sampling import SamplingSettings
from deepseek_serving.openai_endpoint.text_stream import TextStream
from deepseek_serving.openai_endpoint.token_logprobs import TokenLogprobs


class Service(Protocol):
    """What an answer needs of the server.

    Attributes:
        engine: Runs the model.
        tokenizer: The model's.
        name: Under which clients ask for the model.
        metrics: Where to count.
        request_log: Where each request's counts go; None keeps none.
    """

    engine: Engine
    tokenizer: PreTrainedTokenizerBase
    name: str
    metrics: Metrics
    request_log: Any


class Answer:
    """One text.

    Args:
        service: The server's parts.
        request: What was asked.
        generation: Its tokens.
        prompt_ids: What is continued.
        settings: With the log-probabilities, as they come.
        index: Which of the request's answers it is.
    """

    def __init__(
        self,
        service: Service,
        request: GenerationRequest,
        generation: Generation,
        prompt_ids: list[int],
        settings: SamplingSettings,
        index: int,
    ) -> None:
        self.service = service
        self.request = request
        self.generation = generation
        self.index = index
        self.usage = Usage(len(prompt_ids))
        self.finish_reason = "length"
        self._logprobs = None
        if settings.record is not None:
            is_chat = isinstance(request, ChatRequest)
            self._logprobs = TokenLogprobs(service.tokenizer, settings.record, is_chat=is_chat)
            if generation.prompt_record is not None:
                self._logprobs.put_before(prompt_ids, generation.prompt_record)
        self._started = time.perf_counter()
        self._first_at = self._started
        self._token_ids = list(prompt_ids)

    async def texts(self) -> AsyncIterator[str]:
        """Yield the text in pieces; `finish_reason` and `usage` are known after the last."""
        if self.request.is_echoed:
            yield self.service.tokenizer.decode(self._token_ids, skip_special_tokens=True)
        try:
            async for text in self._texts():
                yield text
        except RequestRefusedError as error:
            self._observe_duration(error.code or "")
            raise

    def take_logprobs(self) -> dict[str, Any] | None:
        """Return the log-probabilities of the tokens since the last call; None where none were asked for."""
        if self._logprobs is None:
            return None
        return self._logprobs.take(self._token_ids[self.usage.prompt_tokens :])

    async def _texts(self) -> AsyncIterator[str]:
        stream = TextStream(self.service.tokenizer, self.request.stops)
        last = -1
        async for ids in self.generation.tokens():
            if self.usage.completion_tokens == 0:
                self._first_at = time.perf_counter()
                self.service.metrics.first_token.observe(self._first_at - self._started)
            self.usage.completion_tokens += len(ids)
            self.service.metrics.generated_tokens.inc(len(ids))
            last = ids[-1]
            self._token_ids += ids
            text = stream.push(ids)
            if text:
                yield text
            if stream.has_stopped:
                break
        rest = stream.finish()
        if stream.has_stopped or last in self.service.engine.end_tokens:
            self.finish_reason = "stop"
        self._count_finished()
        if rest:
            yield rest

    def _count_finished(self) -> None:
        self._observe_duration("")
        num_written = self.usage.completion_tokens
        if num_written > 1:
            self.service.metrics.per_token.observe((time.perf_counter() - self._first_at) / (num_written - 1))
        log = self.service.request_log
        if log is not None and not self.request.is_echoed:  # whoever scores texts is not whom drift is about
            ids, is_cut = np.array(self._token_ids), self.finish_reason == "length"
            self.generation.take = partial(log_request, log, ids, num_written, is_cut)

    def _observe_duration(self, error_type: str) -> None:
        metrics = self.service.metrics
        metrics.duration.labels(metrics.name, error_type).observe(time.perf_counter() - self._started)


class Reply:
    """What one request gets: one text, or several.

    Args:
        service: The server's parts.
        request: What was asked.
        answers: At least one.
    """

    def __init__(self, service: Service, request: GenerationRequest, answers: list[Answer]) -> None:
        self.service = service
        self.request = request
        self.answers = answers
        self.form = Form(service.name, is_chat=isinstance(request, ChatRequest))
        self.is_told = False  # whether all events were sent

    async def respond(self, http: Request) -> Response:
        """Return the answer as it was asked for.

        Args:
            http: The connection.
        """
        return _EventStream(self) if self.request.stream else await self.whole(http)

    async def whole(self, http: Request) -> Response:
        """Return everything in one piece, or nothing to a client that has gone.

        Args:
            http: The connection.
        """
        gone = asyncio.ensure_future(_wait_for_disconnect(http))
        work = asyncio.gather(*map(self._collect, self.answers))
        either: set[asyncio.Future[Any]] = {gone, work}
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                self.service.metrics.disconnected.inc()
                return Response(status_code=499)
            return JSONResponse(self.form.whole(work.result(), self._usage()))
        finally:
            gone.cancel()
            work.cancel()
            self.close()

    async def events(self) -> AsyncIterator[str]:
        """Yield server-sent events; a failure on the way is one of them."""
        try:
            if self.form.is_chat:
                for answer in self.answers:
                    yield self.form.piece(answer.index, "", is_first=True)
            async for answer, text in self._merge():
                logprobs = answer.take_logprobs()
                if text is not None:
                    yield self.form.piece(answer.index, text, logprobs=logprobs)
                else:
                    yield self.form.piece(answer.index, None, answer.finish_reason, logprobs=logprobs)
            options = self.request.stream_options
            if options is not None and options.include_usage:
                yield self.form.usage_piece(self._usage())
            yield "data: [DONE]\n\n"
            self.is_told = True
        except RequestRefusedError as error:
            self.service.metrics.refused.labels(error.code).inc()
            yield event(error.body)
            self.is_told = True

    def close(self) -> None:
        """Give the places back."""
        for answer in self.answers:
            answer.generation.close()

    async def _merge(self) -> AsyncIterator[tuple[Answer, str | None]]:
        """Pieces of all answers as they come; None ends one."""
        pieces: asyncio.Queue[tuple[Answer, str | None] | Exception] = asyncio.Queue()

        async def pump(answer: Answer) -> None:
            try:
                async for text in answer.texts():
                    pieces.put_nowait((answer, text))
                pieces.put_nowait((answer, None))
            except RequestRefusedError as error:
                pieces.put_nowait(error)

        tasks = [asyncio.ensure_future(pump(answer)) for answer in self.answers]
        try:
            num_left = len(tasks)
            while num_left:
                piece = await pieces.get()
                if isinstance(piece, Exception):
                    raise piece
                num_left -= piece[1] is None
                yield piece
        finally:
            for task in tasks:
                task.cancel()

    async def _collect(self, answer: Answer) -> dict[str, Any]:
        text = "".join([text async for text in answer.texts()])
        return self.form.choice(answer.index, text, answer.finish_reason, answer.take_logprobs())

    def _usage(self) -> Usage:
        written = sum(answer.usage.completion_tokens for answer in self.answers)
        return Usage(self.answers[0].usage.prompt_tokens, written)


class _EventStream(StreamingResponse):
    """Closes the generations also where the client goes before the first event is asked for."""

    def __init__(self, reply: Reply) -> None:
        super().__init__(reply.events(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self.reply = reply

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            if not self.reply.is_told:
                self.reply.service.metrics.disconnected.inc()
            self.reply.close()


async def _wait_for_disconnect(http: Request) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass
