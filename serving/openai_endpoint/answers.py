"""OpenAI's JSON for completions and chat, whole and in pieces."""

import json
import time
import uuid
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Usage:
    """Token counts of one request.

    Attributes:
        prompt_tokens: Read.
        completion_tokens: Written, the end token among them.
    """

    prompt_tokens: int
    completion_tokens: int = 0

    @property
    def body(self) -> dict[str, int]:
        """As OpenAI writes it."""
        total = self.prompt_tokens + self.completion_tokens
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": total,
        }


@dataclass
class Form:
    """Writes the answers to one request.

    Attributes:
        model: The served name.
        is_chat: Chat, or plain completion.
    """

    model: str
    is_chat: bool
    id: str = field(init=False)
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.id = f"{'chatcmpl' if self.is_chat else 'cmpl'}-{uuid.uuid4().hex}"

    def whole(self, choices: list[dict[str, Any]], usage: Usage) -> dict[str, Any]:
        """Return the answer to a request without `stream`."""
        kind = "chat.completion" if self.is_chat else "text_completion"
        return {**self._head(kind), "choices": choices, "usage": usage.body}

    def choice(self, index: int, text: str, finish_reason: str, logprobs: dict[str, Any] | None) -> dict[str, Any]:
        """Return one of the answer's texts."""
        content = {"message": {"role": "assistant", "content": text}} if self.is_chat else {"text": text}
        return {"index": index, **content, "logprobs": logprobs, "finish_reason": finish_reason}

    def piece(
        self,
        index: int,
        text: str | None,
        finish_reason: str | None = None,
        *,
        is_first: bool = False,
        logprobs: dict[str, Any] | None = None,
    ) -> str:
        """Return one server-sent event; text None adds nothing."""
        delta = ({"role": "assistant"} if is_first else {}) | ({} if text is None else {"content": text})
        content = {"delta": delta} if self.is_chat else {"text": text or ""}
        choice = {"index": index, **content, "logprobs": logprobs, "finish_reason": finish_reason}
        return event({**self._head(self._kind_of_piece), "choices": [choice]})

    def usage_piece(self, usage: Usage) -> str:
        """Return the event that `include_usage` asks for."""
        return event({**self._head(self._kind_of_piece), "choices": [], "usage": usage.body})

    @property
    def _kind_of_piece(self) -> str:
        return "chat.completion.chunk" if self.is_chat else "text_completion"

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


def event(body: dict[str, Any]) -> str:
    """Return one server-sent event."""
    return f"data: {json.dumps(body)}\n\n"
