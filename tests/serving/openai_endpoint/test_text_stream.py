"""Pieces put together are the whole text, for characters of several tokens and stop strings across pieces."""

import pytest
from endpoint_server import make_tokenizer

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
from deepseek_serving.openai_endpoint.text_stream import TextStream

TEXT = "na\u00efve \u4f60\u597d \U0001f600 end"


def pieces(text, stops, ids=None):
    tokenizer = make_tokenizer()
    stream = TextStream(tokenizer, stops)
    found = []
    for number in ids or tokenizer(text)["input_ids"]:
        found.append(stream.push([number]))
        if stream.has_stopped:
            break
    return [*found, stream.finish()]


def test_no_piece_holds_half_a_character():
    found = pieces(TEXT, [])
    assert "".join(found) == TEXT
    assert not any("\ufffd" in piece for piece in found)


@pytest.mark.parametrize("stop", ["\u597d", " \u4f60", "end", "v", "zz", "nd!"])
def test_a_stop_string_is_never_sent(stop):
    assert "".join(pieces(TEXT, [stop, "never"])) == TEXT.partition(stop)[0]


def test_half_a_character_at_the_very_end_is_told_as_such():
    ids = make_tokenizer()("ok \u4f60")["input_ids"][:-1]
    assert "".join(pieces("", [], ids)) == "ok \ufffd"
