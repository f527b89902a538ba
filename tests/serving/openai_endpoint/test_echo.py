"""`echo` with `logprobs`: a prompt's own log-probabilities, as clients that score texts ask for them."""

import asyncio

import pytest
import torch

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
openai = pytest.importorskip("openai", reason="the official client, of the extra `test`, is not installed")
from endpoint_server import make_model, make_tokenizer, serving, wait_until  # noqa: E402

TEXTS = ["a", "The King", "你好, x" * 12, "zz " * 50, "zz " * 50 + "end", "What is a lymph node?"]
ASK = {"model": "tiny", "max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 2}


@pytest.fixture(scope="module", params=["ours", pytest.param("stock", marks=pytest.mark.slow)])
def running(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("requests")
    with serving(make_model(request.param), max_batch_tokens=64, requests_folder=folder) as server:
        yield server


async def ask_all(url, asks):
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        return await asyncio.gather(*[client.completions.create(**ask) for ask in asks])


def test_prompts_are_scored_among_others_that_only_write(running):
    """Longer than a pass, with a beginning that is in the cache, as text and as ids, beside plain requests."""
    tokenizer = make_tokenizer()
    asks = [ASK | {"prompt": text} for text in TEXTS]
    asks += [ASK | {"prompt": tokenizer(text)["input_ids"]} for text in TEXTS]
    asks += [ASK | {"prompt": [tokenizer(TEXTS[3])["input_ids"]]}, ASK | {"prompt": [TEXTS[3]]}]
    plain = [{"model": "tiny", "prompt": text, "max_tokens": 9, "temperature": 0} for text in TEXTS]
    before = asyncio.run(ask_all(running.url, plain))
    mixed = [ask for pair in zip(asks, plain * 3, strict=False) for ask in pair]
    told = asyncio.run(ask_all(running.url, mixed))
    assert [one.choices[0].text for one in told[1::2]] == [one.choices[0].text for one in before * 3][: len(asks)]
    for text, answer in zip([*TEXTS, *TEXTS, TEXTS[3], TEXTS[3]], told[::2], strict=True):
        ids, choice = tokenizer(text)["input_ids"], answer.choices[0]
        with torch.inference_mode():
            logps = running.engine.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        expected = [float(row[token]) for row, token in zip(logps, ids[1:], strict=False)]
        assert choice.text.startswith(text) and choice.logprobs.token_logprobs[0] is None
        assert choice.logprobs.top_logprobs[0] is None
        assert choice.logprobs.token_logprobs[1 : len(ids)] == pytest.approx(expected, abs=1e-4)
        assert max(choice.logprobs.top_logprobs[len(ids)].values()) == pytest.approx(float(logps[-1].max()), abs=1e-4)
        offsets = [
            len(tokenizer.decode(ids[:place], skip_special_tokens=True).rstrip("\ufffd")) for place in range(len(ids))
        ]
        assert choice.logprobs.text_offset[: len(ids)] == offsets
        assert len(choice.logprobs.tokens) == answer.usage.total_tokens == len(choice.logprobs.text_offset)
    wait_until(lambda: running.engine.num_live == 0)


def test_without_logprobs_the_prompt_is_only_repeated_and_streams_are_refused(running):
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as client:
        ask = {"model": "tiny", "prompt": "The King", "max_tokens": 3, "temperature": 0}
        text = client.completions.create(**ask).choices[0].text
        choice = client.completions.create(**ask, echo=True).choices[0]
        assert choice.text == f"The King{text}" and choice.logprobs is None
        for more in ({"stream": True}, {"n": 2}):
            with pytest.raises(openai.BadRequestError, match="echo: got true with stream or n"):
                client.completions.create(**ask, echo=True, **more)
        with pytest.raises(openai.BadRequestError, match="prompt"):
            client.completions.create(**ask | {"prompt": ["one", "two"]})
