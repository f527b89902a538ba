"""Log-probabilities of the written tokens in OpenAI's two forms, of completions and of chat."""

from typing import Any

from transformers import PreTrainedTokenizerBase

from deepseek_serving.openai_endpoint.prompt_logprobs import PromptRecord, TokenRecord

_HALF_CHARACTER = "\ufffd"
# Tokens that one character may be spread over, and more.
_NEAR = 8


class TokenLogprobs:
    """Writes each token's log-probability once, in pieces or as a whole.

    Args:
        tokenizer: What decodes.
        record: Of each token the log-probability, and the likeliest tokens with theirs; filled by the sampler.
        is_chat: Chat, or plain completion.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, record: list[TokenRecord], *, is_chat: bool) -> None:
        self._tokenizer = tokenizer
        self._record = record
        self._is_chat = is_chat
        self._num_told = 0
        self._prompt_ids: list[int] = []
        self._prompt_record: PromptRecord = []

    def put_before(self, ids: list[int], record: PromptRecord) -> None:
        """Tell the prompt's tokens first.

        Args:
            ids: The prompt.
            record: One entry per token; None has no log-probability.
        """
        self._prompt_ids, self._prompt_record = ids, record

    def take(self, ids: list[int]) -> dict[str, Any]:
        """Return what was not told before.

        Args:
            ids: All written tokens.
        """
        places = range(self._num_told, len(ids))
        self._num_told = len(ids)
        if self._is_chat:
            return {"content": [self._chat_entry(ids[place], *self._record[place]) for place in places]}
        all_ids = self._prompt_ids + ids
        record = [*self._prompt_record, *self._record]
        if self._prompt_ids:
            places = range(len(all_ids))  # with a prompt in front everything is told at once
        return {
            "tokens": [self._decode(all_ids[place]) for place in places],
            "token_logprobs": [entry and entry[0] for entry in record[places.start : places.stop]],
            "top_logprobs": [entry and self._by_text(*entry[1:]) for entry in record[places.start : places.stop]],
            "text_offset": self._offsets(all_ids)[places.start :],
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

    def _offsets(self, ids: list[int]) -> list[int]:
        """Characters before each token, those of whole characters only."""
        offsets, before = [], 0
        for place in range(len(ids)):
            offsets.append(before)
            near = ids[max(0, place - _NEAR) : place + 1]  # a long text is not decoded anew for each of its tokens
            before += self._count_characters(near) - self._count_characters(near[:-1])
        return offsets

    def _count_characters(self, ids: list[int]) -> int:
        return len(self._tokenizer.decode(ids, skip_special_tokens=True).rstrip(_HALF_CHARACTER))
