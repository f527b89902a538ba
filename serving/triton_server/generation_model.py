"""Generation in Triton: the endpoint's own engine behind a decoupled model, so that answers stream and share a batch.

Loaded by a stub of Triton's Python back-end, as `batched_models.py`. Triton hands each request over as it comes; the
engine's continuous batching does what dynamic batching cannot, for an answer takes as many steps as it has tokens.
"""

import asyncio
import threading
from typing import Any

import torch
import triton_python_backend_utils as pb_utils
from pydantic import ValidationError

from deepseek_records.loading import check_vocabulary, load_model, load_tokenizer
from deepseek_serving.openai_endpoint.app import Service
from deepseek_serving.openai_endpoint.engine import Engine, Limits
from deepseek_serving.openai_endpoint.refusals import RequestRefusedError
from deepseek_serving.openai_endpoint.request_fields import CompletionRequest, describe
from deepseek_serving.triton_server.expert_metrics import EVERY_S, ExpertMetrics
from deepseek_serving.triton_server.stub import LiveCount, begin_stub, device_of, read_settings, string_tensor

_NAME = "generate"
_SETTINGS = ("max_tokens", "temperature", "top_p", "seed", "stream")
_LOOK_S = 0.1


class GenerationModel:
    """Continues prompts; with `stream` piece by piece, else in one answer."""

    def initialize(self, args: dict[str, Any]) -> None:
        """Load the model and start the engine; called by Triton."""
        begin_stub(args)
        self.live = LiveCount(args)
        settings = read_settings(args)
        options = {"trust_remote_code": settings["trust_remote_code"]}
        tokenizer = load_tokenizer(settings["checkpoint"], **options)
        model = load_model(settings["checkpoint"], attn_implementation="sdpa", **options).to(device_of(args))
        check_vocabulary(model, tokenizer)
        self.engine = Engine(model, Limits(context=settings["context"], **settings["limits"])).__enter__()
        self.service = Service(self.engine, tokenizer, _NAME)
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        asyncio.run_coroutine_threadsafe(self._tell_experts(args["model_name"]), self.loop)

    def execute(self, requests: list[Any]) -> None:
        """Take requests on and return at once; called by Triton."""
        for request in requests:
            sender = request.get_response_sender()
            asyncio.run_coroutine_threadsafe(self._answer(_read(request), sender), self.loop)

    def finalize(self) -> None:
        """Stop the engine; called by Triton when no request is left."""
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(5)
        self.engine.__exit__()

    async def _tell_experts(self, name: str) -> None:
        assert self.engine.routing is not None
        metrics = ExpertMetrics(self.engine.routing, name)
        while True:
            try:
                metrics.hand_over()
            except Exception as error:  # figures are not worth an answer
                pb_utils.Logger.log_warn(f"the experts' load is told no longer: {type(error).__name__}")
                return
            await asyncio.sleep(EVERY_S)

    async def _answer(self, fields: dict[str, Any] | str, sender: Any) -> None:
        self.live.add(1)
        try:
            if isinstance(fields, str):
                raise RequestRefusedError(400, fields)
            try:
                body = CompletionRequest(model=_NAME, **fields)
            except ValidationError as error:
                raise RequestRefusedError(400, describe([dict(one) for one in error.errors()])[0]) from None
            (answer,) = self.service.begin(body)
            work = asyncio.ensure_future(self._send(answer, sender))
            try:
                while not work.done() and not sender.is_cancelled():
                    await asyncio.wait({work}, timeout=_LOOK_S)
                if work.done():
                    work.result()
                else:
                    self.service.metrics.disconnected.inc()
                    sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
            finally:
                work.cancel()
                answer.generation.close()
        except RequestRefusedError as error:
            _refuse(sender, error.message, error.status)
        except Exception as error:  # every request must get its end
            pb_utils.Logger.log_error(f"a request failed: {type(error).__name__}")
            _refuse(sender, "the server failed at this request", 500)
        finally:
            self.live.add(-1)

    async def _send(self, answer: Any, sender: Any) -> None:
        held = ""
        async for text in answer.texts():
            if answer.request.stream:
                sender.send(_respond(text, "", answer.usage.completion_tokens))
            else:
                held += text
        last = _respond(held, answer.finish_reason, answer.usage.completion_tokens)
        sender.send(last, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)


def _read(request: Any) -> dict[str, Any] | str:
    """A request's fields, or what is wrong with them."""
    fields: dict[str, Any] = {}
    for name in ("prompt", "stop", *_SETTINGS):
        tensor = pb_utils.get_input_tensor_by_name(request, name)
        if tensor is None:
            continue
        values = tensor.as_numpy().reshape(-1).tolist()
        try:
            texts = [value.decode() if isinstance(value, bytes) else value for value in values]
        except UnicodeDecodeError:
            return f"{name}: got bytes that are not UTF-8, expected text"
        if name != "stop" and len(texts) != 1:
            return f"{name}: got {len(texts)} values, expected one"
        fields[name] = texts if name == "stop" else texts[0]
    return fields


def _respond(text: str, finish_reason: str, num_tokens: int) -> Any:
    return pb_utils.InferenceResponse(
        output_tensors=[
            string_tensor("text", [text]),
            string_tensor("finish_reason", [finish_reason]),
            pb_utils.Tensor.from_dlpack("completion_tokens", torch.tensor([num_tokens], dtype=torch.int32)),
        ]
    )


def _refuse(sender: Any, message: str, status: int) -> None:
    codes = {400: pb_utils.TritonError.INVALID_ARG, 404: pb_utils.TritonError.INVALID_ARG}
    code = codes.get(status, pb_utils.TritonError.UNAVAILABLE if status > 500 else pb_utils.TritonError.INTERNAL)
    refusal = pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code))
    sender.send(refusal, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
