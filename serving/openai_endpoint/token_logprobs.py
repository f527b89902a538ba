"""Log-probabilities of the written tokens in OpenAI's two forms, of completions and of chat."""

from typing import Any

from transformers import PreTrainedTokenizerBase

_HALF_CHARACTER = "\ufffd"


class TokenLogprobs:
    """Writes each token's log-probability once, in pieces or as a whole.

    Args:
        tokenizer: What decodes.
        record: Of each token the log-probability, and the likeliest tokens with theirs; filled by the sampler.
        is_chat: Chat, or plain completion.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, record: list[tuple[float, list[int], list[float]]], *, is_chat: bool
    ) -> None:
        self._tokenizer = tokenizer
        self._record = record
        self._is_chat = is_chat
        self._num_told = 0

    def take(self, ids: list[int]) -> dict[str, Any]:
        """Return what was not told before.

        Args:
            ids: All written tokens.
        """
        places = range(self._num_told, len(ids))
        self._num_told = len(ids)
        if self._is_chat:
            return {"content": [self._chat_entry(ids[place], *self._record[place]) for place in places]}
        return {
            "tokens": [self._decode(ids[place]) for place in places],
            "token_logprobs": [self._record[place][0] for place in places],
            "top_logprobs": [self._by_text(*self._record[place][1:]) for place in places],
            "text_offset": [self._count_characters(ids[:place]) for place in places],
        }

    def _by_text(self, top_ids: list[int], top_logps: list[float]) -> dict[str, float]:
        """The likeliest of those tokens that are written alike, such as parts of characters."""
        pairs = zip(reversed(top_ids), reversed(top_logps), strict=True)
        return {self._decode(token): logp for token, logp in pairs}

    def _chat_entry(self, token: int, logp: float, top_ids: list[int], top_logps: list[float]) -> dict[str, Any]:
        likeliest = [self._entry(*pair) for pair in zip(top_ids, top_logps, strict=True)]
        return self._entry(token, logp) | {"top_logprobs": likeliest}

    def _entry(self, token: int, logp: float) -> dict[str, Any]:
        text = self._decode(token)
        # Of a part of a character the tokenizer does not tell the bytes.
        return {"token": text, "logprob": logp, "bytes": None if _HALF_CHARACTER in text else list(text.encode())}

    def _decode(self, token: int) -> str:
        return self._tokenizer.decode([token])

    def _count_characters(self, ids: list[int]) -> int:
        return len(self._tokenizer.decode(ids, skip_special_tokens=True).rstrip(_HALF_CHARACTER))
