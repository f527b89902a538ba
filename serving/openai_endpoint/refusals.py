"""The one exception for a request that gets no answer, and OpenAI's form of telling it."""

from typing import Any


class RequestRefusedError(Exception):
    """A request cannot be answered; the client is told why.

    Args:
        status: HTTP status.
        message: What is wrong, without paths and without the prompt.
        param: The field of the request; None where it is none of them.
        code: A word for programs.
    """

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code

    @property
    def body(self) -> dict[str, Any]:
        """The JSON that OpenAI's clients understand."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """When to come again, where that helps."""
        return {"Retry-After": "1"} if self.status == 503 else {}
