"""A model behind a server with OpenAI's protocol, where the harness has a loaded one.

`harness.py` puts a `ServedModel` into `LoadedModel.model`; the scoring functions of ``answers/`` ask it in place of
running a forward pass. Texts are encoded here, by the model's tokenizer, and sent as token ids, so that prompts, cuts
and scores are those of the checkpoint itself. Scores of given words are read from `echo` with `logprobs`, as
lm-evaluation-harness's local-completions does: ``deepseek-moe serve`` and vLLM give them.
"""

import json
import math
import os
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from deepseek_records.exit_codes import RunFailedError

KEY_VARIABLE = "DEEPSEEK_MOE_API_KEY"
_CLIENTS = 16
MAX_STOPS = 4  # of the protocol; what follows the others is cut off by the caller
_SPARED = 2  # of the context: a scored text is followed by one token that the server writes


def is_endpoint(name: str) -> bool:
    """Return whether a model is named by an address."""
    return name.startswith(("http://", "https://"))


class ServedModel:
    """Asks one server, several requests at a time.

    Args:
        url: With or without `/v1`.

    Attributes:
        name: The first model that the server lists.
        max_length: Tokens that can be scored at once; None where the server does not tell its context.

    Raises:
        RunFailedError: It does not answer.
    """

    def __init__(self, url: str) -> None:
        self._base = url.rstrip("/").removesuffix("/v1") + "/v1"
        listed = _ask(f"{self._base}/models", None)["data"][0]
        self.name = str(listed["id"])
        context = listed.get("max_model_len")
        self.max_length = None if context is None else int(context) - _SPARED
        self._pool = ThreadPoolExecutor(_CLIENTS)

    def score(self, sequences: Iterable[Sequence[int]]) -> list[list[float]]:
        """Return the log-probability of each token of each sequence but its first.

        Args:
            sequences: Token ids, at least two each.

        Raises:
            ValueError: The server refuses, or tells no log-probabilities of prompts.
        """
        return list(self._pool.map(self._score_one, sequences))

    def sum_last(self, rows: Iterable[Sequence[int]], counts: Iterable[int]) -> list[float]:
        """Return the summed log-probability of each row's last tokens.

        Args:
            rows: Token ids.
            counts: How many of each row's last tokens.
        """
        scored = zip(self.score(rows), counts, strict=True)
        return [math.fsum(logps[len(logps) - count :]) for logps, count in scored]

    def complete(self, bodies: Iterable[dict[str, Any]]) -> Iterator[str]:
        """Yield what the model writes for each request, in their order.

        Args:
            bodies: Fields of a completion, without the model.
        """
        yield from (str(choice["text"]) for choice in self._pool.map(self._completion, bodies))

    def _score_one(self, ids: Sequence[int]) -> list[float]:
        asked = {"prompt": [int(number) for number in ids], "max_tokens": 1, "temperature": 0, "logprobs": 1}
        told = self._completion({**asked, "echo": True}).get("logprobs") or {}
        logps = told.get("token_logprobs") or []
        if len(logps) < len(ids) or any(logp is None for logp in logps[1 : len(ids)]):
            raise ValueError(
                f"tasks: {self._base} tells {len(logps)} log-probabilities for {len(ids)} tokens, expected one each; "
                "tasks that compare given words need a server that honors echo with logprobs"
            )
        return [float(logp) for logp in logps[1 : len(ids)]]

    def _completion(self, body: dict[str, Any]) -> dict[str, Any]:
        choice: dict[str, Any] = _ask(f"{self._base}/completions", {"model": self.name, **body})["choices"][0]
        return choice


def _ask(address: str, body: dict[str, Any] | None) -> dict[str, Any]:
    """The JSON that a server answers to a body that is posted, or to a GET without one."""
    headers = {"Content-Type": "application/json"}
    if os.environ.get(KEY_VARIABLE):
        headers["Authorization"] = f"Bearer {os.environ[KEY_VARIABLE]}"
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(address, data, headers), timeout=600) as answer:
            told: dict[str, Any] = json.load(answer)
            return told
    except urllib.error.HTTPError as error:
        raise ValueError(
            f"{address}: refused with {error.code}: {error.read()[:300].decode(errors='replace')}"
        ) from None
    except (OSError, ValueError) as error:
        raise RunFailedError(f"{address}: no answer ({error})") from None
