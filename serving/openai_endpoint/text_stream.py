"""From tokens to text as it is sent: whole characters only, and nothing of a stop string."""

from transformers import PreTrainedTokenizerBase

_HALF_CHARACTER = "\ufffd"


class TextStream:
    """Decodes one request's tokens piece by piece; the pieces put together are the whole text.

    Args:
        tokenizer: What decodes.
        stops: Strings at which the text ends; they are not part of it.

    Attributes:
        has_stopped: Whether a stop string came.
        num_tokens: Tokens seen.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: list[str]) -> None:
        self.has_stopped = False
        self.num_tokens = 0
        self._tokenizer = tokenizer
        self._stops = stops
        self._ids: list[int] = []
        # Tokens before `_sent` are passed on; from `_context` on they are decoded again with the next ones, since many
        # tokenizers write a token's space by what stands before it.
        self._context = 0
        self._sent = 0
        self._held = ""

    def push(self, token_ids: list[int]) -> str:
        """Return the text that can be sent now.

        Args:
            token_ids: The next tokens.
        """
        self._ids += token_ids
        self.num_tokens += len(token_ids)
        return self._release(self._decode_new(is_last=False), is_last=False)

    def finish(self) -> str:
        """Return what was held back, after the last token."""
        return "" if self.has_stopped else self._release(self._decode_new(is_last=True), is_last=True)

    def _decode_new(self, *, is_last: bool) -> str:
        known = self._tokenizer.decode(self._ids[self._context : self._sent], skip_special_tokens=True)
        text = self._tokenizer.decode(self._ids[self._context :], skip_special_tokens=True)
        if len(text) <= len(known) or (text.endswith(_HALF_CHARACTER) and not is_last):
            return ""
        self._context, self._sent = self._sent, len(self._ids)
        return text[len(known) :]

    def _release(self, new: str, *, is_last: bool) -> str:
        text = self._held + new
        found = [place for place in (text.find(stop) for stop in self._stops) if place >= 0]
        if found:
            self.has_stopped, self._held = True, ""
            return text[: min(found)]
        num_held = 0 if is_last else max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held]


def _overlap(text: str, stop: str) -> int:
    """How many last characters of a text are the first ones of a stop string."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
