"""The endpoints: /v1/models, /v1/completions, /v1/chat/completions, /health and /metrics."""

import secrets
import time
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from transformers import PreTrainedTokenizerBase

from deepseek_records.user_text import encode, encode_chat, protect
from deepseek_serving.monitoring.request_log import open_log
from deepseek_serving.openai_endpoint.answering import Answer, Reply
from deepseek_serving.openai_endpoint.engine import Engine
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

    def begin(self, request: GenerationRequest) -> list[Answer]:
        """Encode, check against the limits and take on one request; returns an answer for each of its `n`.

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
            if request.top_logprobs is not None and not request.logprobs:
                raise _bad("top_logprobs", "got a number without logprobs, expected logprobs: true with it")
            ids, field, asked = self._encode_chat(request), "messages", request.max_completion_tokens
        else:
            assert isinstance(request, CompletionRequest)
            if request.echo and (request.stream or (request.n or 1) > 1):
                raise _bad("echo", "got true with stream or n, expected one answer in one piece")
            ids, field, asked = self._encode_prompt(request), "prompt", None
        max_tokens = self._bound(request, len(ids), field, asked)
        is_scored = request.is_echoed and request.num_top is not None
        answers: list[Answer] = []
        try:
            for index in range(request.n or 1):
                settings = _choose_sampling(request, index)
                generation = self.engine.submit(ids, settings, max_tokens, is_scored=is_scored)
                answers.append(Answer(self, request, generation, ids, settings, index))
        except RequestRefusedError:
            for answer in answers:
                answer.generation.close()
            raise
        self.metrics.prompt_tokens.inc(len(ids))
        return answers

    def close(self) -> None:
        """Write what is left of the requests' counts, after the last answer."""
        if self.request_log is not None:
            if self.engine.routing is not None:
                self.engine.routing.flush()
            self.request_log.close()

    def _encode_prompt(self, request: CompletionRequest) -> list[int]:
        prompt = request.text_or_ids
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
        limits = service.engine.limits
        only["max_model_len"] = min(limits.context, limits.cache_tokens)  # as vLLM tells it, for who scores texts
        return {"object": "list", "data": [only]}

    @app.post("/v1/completions", response_model=None)
    async def completions(body: CompletionRequest, http: Request) -> Response:
        return await Reply(service, body, service.begin(body)).respond(http)

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(body: ChatRequest, http: Request) -> Response:
        return await Reply(service, body, service.begin(body)).respond(http)

    @app.get("/health")
    async def health() -> JSONResponse:
        failure = service.engine.failure
        status = "ok" if failure is None else "failed"
        return JSONResponse({"status": status}, status_code=200 if failure is None else 503)

    @app.get("/metrics", response_model=None)
    async def metrics() -> Response:
        return Response(service.metrics.render(), media_type="text/plain; version=0.0.4")

    return Gate(app, metrics=service.metrics, api_key=api_key, max_body_bytes=service.engine.limits.max_body_bytes)


def _choose_sampling(request: GenerationRequest, index: int) -> SamplingSettings:
    """Settings of one of a request's answers: each draws by a seed of its own."""
    return SamplingSettings(
        seed=secrets.randbits(63) if request.seed is None else request.seed + index,
        temperature=1.0 if request.temperature is None else request.temperature,
        top_p=1.0 if request.top_p is None else request.top_p,
        num_top=request.num_top or 0,
        record=None if request.num_top is None else [],
    )


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


def _check_text(field: str, text: str) -> None:
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise _bad(field, "got half a character (a lone surrogate), expected Unicode text")


def _bad(field: str, message: str, code: str = "invalid_request") -> RequestRefusedError:
    return RequestRefusedError(400, f"{field}: {message}", param=field, code=code)
