"""The Hub's refusals as one line each, saying what to do instead."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def one_line_errors(repo_id: str) -> Iterator[None]:
    """Turn what the Hub or the network refuses inside the block into a `ValueError` of one line.

    Args:
        repo_id: The repository, named in the message.

    Raises:
        ValueError: The token was refused, the repository is missing or closed, or the server cannot be reached.
    """
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

    try:
        import httpx2 as httpx
    except ImportError:  # huggingface_hub below 2 speaks through httpx itself
        import httpx

    try:
        yield
    except OfflineModeIsEnabled:
        raise ValueError("Hub: offline mode is on; unset HF_HUB_OFFLINE, or pass --dry-run") from None
    except RepositoryNotFoundError as error:
        raise ValueError(_repository_message(repo_id, error.response.status_code)) from None
    except HfHubHTTPError as error:
        raise ValueError(_http_message(repo_id, error)) from None
    except (httpx.TransportError, RuntimeError) as error:
        # An upload of several large files wraps what happened to one of them in a RuntimeError.
        cause = error.__cause__ if isinstance(error, RuntimeError) else error
        if isinstance(cause, HfHubHTTPError):
            raise ValueError(_http_message(repo_id, cause)) from None
        if not isinstance(cause, httpx.TransportError):
            raise
        reason = str(cause).splitlines()[0] if str(cause) else type(cause).__name__
        raise ValueError(f"Hub: connection lost ({reason}); run the command again, what was sent is kept") from None


def _repository_message(repo_id: str, status: int) -> str:
    if status == 401:
        return f"REPO: {repo_id} is missing or closed to this token (401); run `hf auth login` or set HF_TOKEN"
    return f"REPO: {repo_id} does not exist, or its owner does not ({status}); check the name"


def _http_message(repo_id: str, error: Any) -> str:
    status = error.response.status_code
    said = (error.server_message or error.response.headers.get("x-error-message") or "").splitlines()
    reason = f": {said[0]}" if said else ""
    if status == 401:
        return "token: the Hub refused it (401); run `hf auth login` or set HF_TOKEN to one with write access"
    if status == 403:
        return f"REPO: this token may not write to {repo_id} (403){reason}"
    return f"Hub: refused the upload to {repo_id} ({status}){reason}"
