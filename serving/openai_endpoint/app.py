"""The endpoints: /v1/models, /v1/completions, /v1/chat/completions, /health and /metrics."""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from transformers import PreTrainedTokenizerBase

from deepseek_records.user_text import encode, encode_chat, protect
from deepseek_serving.monitoring.request_log import log_request, open_log
from deepseek_serving.openai_endpoint.answers import Form, Usage, event
from deepseek_serving.openai_endpoint.engine import Engine, Generation
from deepseek_serving.openai_endpoint.gate import Gate
from deepseek_serving.openai_endpoint.metrics import Metrics
from deepseek_serving.openai_endpoint.refusals import RequestRefusedError
from deepseek_serving.openai_endpoint.request_fields import (
    ChatRequest,
    CompletionRequest,
    GenerationRequest,
    describe,
)
from deepseek_serving.openai_endpoint.sampling import SamplingSettings
from deepseek_serving.openai_endpoint.text_stream import TextStream

# OpenAI's own default where a completion names no max_tokens.
_COMPLETION_TOKENS = 16


class Service:
    """What the endpoints share.

    Args:
        engine: Runs the model.
        tokenizer: The model's.
        name: Under which clients ask for the model.
        requests_folder: Where each request's counts go, for drift; None keeps none.
    """

    def __init__(
        self, engine: Engine, tokenizer: PreTrainedTokenizerBase, name: str, requests_folder: Path | None = None
    ) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.name = name
        self.metrics = Metrics(engine, name, requests_folder)
        self.request_log = None if requests_folder is None else open_log(requests_folder, engine)

    def begin(self, request: GenerationRequest) -> "Answer":
        """Encode, check against the limits and take on one request.

        Args:
            request: Of either endpoint.

        Raises:
            RequestRefusedError: The model is another, the prompt is empty or too long, or the engine refuses.
        """
        if request.model != self.name:
            raise RequestRefusedError(
                404, f"model: this server has {self.name!r} only", param="model", code="model_not_found"
            )
        if isinstance(request, ChatRequest):
            ids, field, asked = self._encode_chat(request), "messages", request.max_completion_tokens
        else:
            assert isinstance(request, CompletionRequest)
            ids, field, asked = self._encode_prompt(request), "prompt", None
        max_tokens = self._bound(request, len(ids), field, asked)
        settings = SamplingSettings(
            seed=secrets.randbits(63) if request.seed is None else request.seed,
            temperature=1.0 if request.temperature is None else request.temperature,
            top_p=1.0 if request.top_p is None else request.top_p,
        )
        generation = self.engine.submit(ids, settings, max_tokens)
        self.metrics.prompt_tokens.inc(len(ids))
        return Answer(self, request, generation, Usage(len(ids)), ids)

    def close(self) -> None:
        """Write what is left of the requests' counts, after the last answer."""
        if self.request_log is not None:
            if self.engine.routing is not None:
                self.engine.routing.flush()
            self.request_log.close()

    def _encode_prompt(self, request: CompletionRequest) -> list[int]:
        prompt = request.prompt
        if isinstance(prompt, list):
            num_rows = self.engine.model.get_input_embeddings().weight.shape[0]
            if not all(0 <= number < num_rows for number in prompt):
                raise _bad("prompt", f"got a token id outside of 0 to {num_rows - 1}, expected the model's ids")
            return prompt
        _check_text("prompt", prompt)
        return encode(protect(prompt, self.tokenizer), self.tokenizer, add_special_tokens=True)

    def _encode_chat(self, request: ChatRequest) -> list[int]:
        if self.tokenizer.chat_template is None:
            raise _bad("messages", "the model has no chat template; /v1/completions continues plain text")
        for message in request.messages:
            _check_text("messages", message.content)
        try:
            messages = [message.model_dump() for message in request.messages]
            return encode_chat(messages, self.tokenizer, add_generation_prompt=True)
        except ValueError:  # its words may hold the conversation's
            raise _bad("messages", "the model's chat template refuses this order or choice of roles") from None

    def _bound(self, request: GenerationRequest, num_prompt: int, field: str, asked: int | None) -> int:
        limits = self.engine.limits
        if num_prompt == 0:
            raise _bad(field, "got an empty text, expected at least one token")
        room = min(limits.context, limits.cache_tokens) - num_prompt
        if room < 1:
            raise _bad(field, f"got {num_prompt} tokens, expected fewer than {room + num_prompt}", "too_long")
        name = "max_tokens" if asked is None else "max_completion_tokens"
        if asked is not None and request.max_tokens is not None:
            raise _bad(name, "got both this and max_tokens, expected one of them")
        asked = request.max_tokens if asked is None else asked
        if asked is None:
            return min(room, limits.max_tokens, limits.max_tokens if field == "messages" else _COMPLETION_TOKENS)
        most = min(room, limits.max_tokens)
        if asked > most:
            raise _bad(name, f"got {asked}, expected at most {most} after a prompt of {num_prompt} tokens", "too_long")
        return asked


class Answer:
    """One request that is being answered.

    Args:
        service: The server's parts.
        request: What was asked.
        generation: Its tokens.
        usage: With the prompt's tokens.
        token_ids: Of the prompt.
    """

    def __init__(
        self,
        service: Service,
        request: GenerationRequest,
        generation: Generation,
        usage: Usage,
        token_ids: list[int],
    ) -> None:
        self.service = service
        self.request = request
        self.generation = generation
        self.usage = usage
        self.form = Form(service.name, is_chat=isinstance(request, ChatRequest))
        self.finish_reason = "length"
        self.is_told = False  # whether all events were sent
        self._started = time.perf_counter()
        self._first_at = self._started
        self._token_ids = list(token_ids)

    async def texts(self) -> AsyncIterator[str]:
        """Yield the text in pieces; `finish_reason` and `usage` are known after the last."""
        try:
            async for text in self._texts():
                yield text
        except RequestRefusedError as error:
            self._observe_duration(error.code or "")
            raise

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
        if log is not None:
            ids, is_cut = np.array(self._token_ids), self.finish_reason == "length"
            self.generation.take = partial(log_request, log, ids, num_written, is_cut)

    def _observe_duration(self, error_type: str) -> None:
        metrics = self.service.metrics
        metrics.duration.labels(metrics.name, error_type).observe(time.perf_counter() - self._started)

    async def whole(self, http: Request) -> Response:
        """Return the answer in one piece, or nothing to a client that has gone."""
        gone = asyncio.ensure_future(_wait_for_disconnect(http))
        work = asyncio.ensure_future(self._collect())
        try:
            await asyncio.wait({gone, work}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                self.service.metrics.disconnected.inc()
                return Response(status_code=499)
            return JSONResponse(self.form.whole(work.result(), self.finish_reason, self.usage))
        finally:
            gone.cancel()
            work.cancel()
            self.generation.close()

    async def events(self) -> AsyncIterator[str]:
        """Yield server-sent events; a failure on the way is one of them."""
        try:
            if self.form.is_chat:
                yield self.form.piece("", is_first=True)
            async for text in self.texts():
                yield self.form.piece(text)
            yield self.form.piece(None, self.finish_reason)
            options = self.request.stream_options
            if options is not None and options.include_usage:
                yield self.form.usage_piece(self.usage)
            yield "data: [DONE]\n\n"
            self.is_told = True
        except RequestRefusedError as error:
            self.service.metrics.refused.labels(error.code).inc()
            yield event(error.body)
            self.is_told = True

    async def _collect(self) -> str:
        return "".join([text async for text in self.texts()])


class _EventStream(StreamingResponse):
    """Closes the generation also where the client goes before the first event is asked for."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(answer.events(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self.answer = answer

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            if not self.answer.is_told:
                self.answer.service.metrics.disconnected.inc()
            self.answer.generation.close()


def build_app(service: Service, api_key: str | None = None) -> Gate:
    """Return the application.

    Args:
        service: The server's parts.
        api_key: What clients must send; None asks for nothing.
    """
    app = FastAPI(title="deepseek-moe serve", docs_url=None, redoc_url=None, openapi_url=None)
    _add_error_forms(app, service.metrics)
    started = int(time.time())

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        only = {"id": service.name, "object": "model", "created": started, "owned_by": "deepseek-moe"}
        return {"object": "list", "data": [only]}

    @app.post("/v1/completions", response_model=None)
    async def completions(body: CompletionRequest, http: Request) -> Response:
        return await _respond(service.begin(body), http)

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(body: ChatRequest, http: Request) -> Response:
        return await _respond(service.begin(body), http)

    @app.get("/health")
    async def health() -> JSONResponse:
        failure = service.engine.failure
        status = "ok" if failure is None else "failed"
        return JSONResponse({"status": status}, status_code=200 if failure is None else 503)

    @app.get("/metrics", response_model=None)
    async def metrics() -> Response:
        return Response(service.metrics.render(), media_type="text/plain; version=0.0.4")

    return Gate(app, metrics=service.metrics, api_key=api_key, max_body_bytes=service.engine.limits.max_body_bytes)


async def _respond(answer: Answer, http: Request) -> Response:
    return _EventStream(answer) if answer.request.stream else await answer.whole(http)


def _add_error_forms(app: FastAPI, metrics: Metrics) -> None:
    def tell(error: RequestRefusedError) -> JSONResponse:
        metrics.refused.labels(error.code).inc()
        return JSONResponse(error.body, status_code=error.status, headers=error.headers)

    @app.exception_handler(RequestRefusedError)
    async def refused(_: Request, error: RequestRefusedError) -> JSONResponse:
        return tell(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        message, field = describe(list(error.errors()))
        return tell(RequestRefusedError(400, message, param=field, code="invalid_request"))

    @app.exception_handler(HTTPException)
    async def other(_: Request, error: HTTPException) -> JSONResponse:
        return tell(RequestRefusedError(error.status_code, str(error.detail), code="invalid_request"))

    @app.exception_handler(Exception)
    async def defect(_: Request, error: Exception) -> JSONResponse:
        return tell(RequestRefusedError(500, "the server failed at this request", code="defect"))


async def _wait_for_disconnect(http: Request) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


def _check_text(field: str, text: str) -> None:
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise _bad(field, "got half a character (a lone surrogate), expected Unicode text")


def _bad(field: str, message: str, code: str = "invalid_request") -> RequestRefusedError:
    return RequestRefusedError(400, f"{field}: {message}", param=field, code=code)
