"""What a request may hold, field by field; everything else is refused by name.

A field of OpenAI's that this server does nothing for is accepted only at the value that asks for nothing.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

_Stop = Annotated[str, Field(min_length=1, max_length=200)]
_Nothing = Annotated[float, Field(ge=0, le=0)]
_One = Annotated[int, Field(ge=1, le=1)]
_Ids = Annotated[list[int], Field(min_length=1)]
_ONE = Field(min_length=1, max_length=1)  # a list of prompts, as some clients write the only one
_SIGNED = 2**63


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class StreamOptions(_Strict):
    """OpenAI's `stream_options`."""

    include_usage: bool = False


class GenerationRequest(_Strict):
    """The fields of both endpoints."""

    model: Annotated[str, Field(max_length=500)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-_SIGNED, lt=_SIGNED)] | None = None
    stop: _Stop | Annotated[list[_Stop], Field(max_length=4)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Annotated[str, Field(max_length=500)] | None = None
    n: Annotated[int, Field(ge=1, le=16)] | None = None
    presence_penalty: _Nothing | None = None
    frequency_penalty: _Nothing | None = None

    @property
    def is_echoed(self) -> bool:
        """Whether the answer begins with the prompt."""
        return False

    @property
    def stops(self) -> list[str]:
        """The stop strings as a list."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def num_top(self) -> int | None:
        """How many of the likeliest tokens are told beside each chosen one; None tells no log-probabilities."""
        raise NotImplementedError


class CompletionRequest(GenerationRequest):
    """POST /v1/completions."""

    prompt: str | _Ids | Annotated[list[str], _ONE] | Annotated[list[_Ids], _ONE]
    best_of: _One | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None

    @property
    def num_top(self) -> int | None:
        """The field `logprobs`."""
        return self.logprobs

    @property
    def is_echoed(self) -> bool:
        """The field `echo`."""
        return bool(self.echo)

    @property
    def text_or_ids(self) -> str | list[int]:
        """The prompt, out of its list if it came in one."""
        if isinstance(self.prompt, list) and not isinstance(self.prompt[0], int):
            return self.prompt[0]
        return self.prompt


class Message(_Strict):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str


class ChatRequest(GenerationRequest):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @property
    def num_top(self) -> int | None:
        """The field `top_logprobs` where `logprobs` is true."""
        return (self.top_logprobs or 0) if self.logprobs else None


def describe(found: list[dict[str, Any]]) -> tuple[str, str | None]:
    """Return one line on the first thing that is wrong, and the field; text of the request is not repeated.

    Args:
        found: pydantic's errors, as FastAPI hands them on.
    """
    first = found[0]
    place = [str(part) for part in first["loc"] if part != "body"]
    if first["type"] == "json_invalid" or not place:
        return "body: got something else, expected a JSON object with content-type application/json", None
    field = place[0]
    if first["type"] == "missing":
        return f"{'.'.join(place)}: missing", field
    if first["type"] == "extra_forbidden":
        return f"{place[-1]}: unknown field", place[-1]
    value = first.get("input")
    got = repr(value) if isinstance(value, bool | int | float) else type(value).__name__
    expected = str(first["msg"]).removeprefix("Input should be ")
    return f"{field}: got {got[:40]}, expected {expected[:200]}", field
