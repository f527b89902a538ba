"""The official client against a real server: answers, streams, sampling and refusals."""

import asyncio
import json
import urllib.error
import urllib.request
from random import Random

import pytest
import torch

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
openai = pytest.importorskip("openai", reason="the official client, of the extra `test`, is not installed")
from endpoint_server import make_model, make_tokenizer, serving, wait_until  # noqa: E402

PROMPTS = [
    "a",
    "The King",
    "Once upon a time there was",
    "x" * 120,
    "8 * 7 =",
    "What is a lymph node?",
    "\u4f60\u597d",
]
PROMPTS.append("zz " * 30)


@pytest.fixture(scope="module", params=["ours", pytest.param("stock", marks=pytest.mark.slow)])
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def running(kind):
    with serving(make_model(kind), max_batch_tokens=64) as server:
        yield server


@pytest.fixture
def client(running):
    return openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0)


def greedy(running, prompt, num_tokens):
    """What `generate` writes, as ids and text."""
    tokenizer = make_tokenizer()
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    written = running.engine.model.generate(ids, max_new_tokens=num_tokens, do_sample=False, pad_token_id=0)
    written = written[0, ids.shape[1] :].tolist()
    return written, tokenizer.decode(written, skip_special_tokens=True)


def test_eight_at_once_equal_greedy_generate(running):
    async def ask(client, prompt):
        return await client.completions.create(model="tiny", prompt=prompt, max_tokens=24, temperature=0)

    async def ask_all():
        async with openai.AsyncOpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*[ask(client, prompt) for prompt in PROMPTS])

    before = running.value("requests_total", path="/v1/completions", status="200")
    answers = asyncio.run(ask_all())
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        ids, text = greedy(running, prompt, 24)
        assert answer.choices[0].text == text
        assert answer.usage.completion_tokens == len(ids)
        assert answer.usage.prompt_tokens == len(make_tokenizer()(prompt)["input_ids"])
    assert len({answer.choices[0].text for answer in answers}) == len(PROMPTS)
    # The counters may lag behind the answer by the time that the connection takes to end.
    wait_until(lambda: running.value("requests_total", path="/v1/completions", status="200") == before + len(PROMPTS))
    assert running.engine.num_live == 0


def test_a_chat_streams_the_same_text(client):
    ask = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "h\u00e9llo <eos>"}],
        "max_tokens": 30,
        "temperature": 0,
    }
    whole = client.chat.completions.create(**ask)
    chunks = list(client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == whole.choices[0].finish_reason
    # <eos> in the user's words is text: five bytes, not one token.
    rendered = "user: h\u00e9llo <eos>\nassistant:"
    assert whole.usage.prompt_tokens == len(rendered.encode())


def test_sampling_is_each_requests_own(running, client):
    def ask(**settings):
        answer = client.completions.create(model="tiny", prompt="The", max_tokens=24, **settings)
        return answer.choices[0].text

    assert ask(seed=7) == ask(seed=7)
    assert len({ask(seed=seed) for seed in range(4)}) == 4
    assert ask(temperature=0) == ask(temperature=1.5, top_p=1e-6) == greedy(running, "The", 24)[1]


def test_several_answers_to_one_request(running, client):
    ask = {"model": "tiny", "prompt": "The King", "max_tokens": 20}
    several = client.completions.create(**ask, n=3, seed=5)
    alone = [client.completions.create(**ask, seed=seed) for seed in (5, 6, 7)]
    assert [choice.text for choice in several.choices] == [one.choices[0].text for one in alone]
    assert [choice.index for choice in several.choices] == [0, 1, 2] and len(
        {one.text for one in several.choices}
    ) == 3
    assert several.usage.completion_tokens == sum(one.usage.completion_tokens for one in alone)
    assert several.usage.prompt_tokens == alone[0].usage.prompt_tokens
    texts = ["", "", ""]
    for chunk in client.completions.create(**ask, n=3, seed=5, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in several.choices]
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "max_tokens": 5, "temperature": 0, "n": 2}
    first, second = client.chat.completions.create(**chat).choices
    assert first.message.content == second.message.content
    wait_until(lambda: running.engine.num_live == 0)


def test_log_probabilities_are_the_models_whole_and_streamed(running, client):
    ask = {"model": "tiny", "prompt": "The King", "max_tokens": 12, "temperature": 0, "logprobs": 3}
    told = client.completions.create(**ask).choices[0]
    ids, text = greedy(running, "The King", 12)
    prompt = make_tokenizer()("The King")["input_ids"]
    with torch.inference_mode():
        logps = running.engine.model(torch.tensor([prompt + ids])).logits[0].log_softmax(-1)[len(prompt) - 1 : -1]
    expected = [float(row[token]) for row, token in zip(logps, ids, strict=True)]
    assert told.text == text and told.logprobs.token_logprobs == pytest.approx(expected, abs=1e-4)
    for row, likeliest in zip(logps, told.logprobs.top_logprobs, strict=True):
        assert max(likeliest.values()) == pytest.approx(float(row.max()), abs=1e-4) and 1 <= len(likeliest) <= 3
    assert told.logprobs.text_offset == sorted(told.logprobs.text_offset) and told.logprobs.text_offset[0] == 0
    streamed = [chunk.choices[0].logprobs for chunk in client.completions.create(**ask, stream=True)]
    pieces = [logp for one in streamed if one is not None for logp in one.token_logprobs]
    assert pieces == pytest.approx(told.logprobs.token_logprobs, abs=1e-5)
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "max_tokens": 6, "temperature": 0}
    entries = client.chat.completions.create(**chat, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    assert len(entries) <= 6
    for entry in entries:
        assert [one.logprob for one in entry.top_logprobs] == sorted(
            (o.logprob for o in entry.top_logprobs), reverse=True
        )
        assert entry.logprob == pytest.approx(entry.top_logprobs[0].logprob, abs=1e-5)  # greedy takes the likeliest
    with pytest.raises(openai.BadRequestError, match="top_logprobs"):
        client.chat.completions.create(**chat, top_logprobs=2)


def test_a_stop_string_ends_the_text_and_the_work(running, client):
    _, text = greedy(running, "The King", 40)
    stop = text[10:12]
    answer = client.completions.create(model="tiny", prompt="The King", max_tokens=40, temperature=0, stop=[stop])
    assert answer.choices[0].text == text[: text.index(stop)]
    assert answer.choices[0].finish_reason == "stop"
    wait_until(lambda: running.engine.num_running == 0)


def post(running, body, path="/v1/completions", **headers):
    """Status and JSON of a raw request."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(running.url + path, data, {"Content-Type": "application/json", **headers})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


BAD = [
    ({"prompt": ""}, 400, "prompt"),
    ({"prompt": []}, 400, "prompt"),
    ({"prompt": [3, 100000]}, 400, "prompt"),
    ({"prompt": ["a", "b"]}, 400, "prompt"),
    ({"prompt": "x" * 300}, 400, "prompt"),
    ({"prompt": "\ud800"}, 400, "prompt"),
    ({"max_tokens": 0}, 400, "max_tokens"),
    ({"max_tokens": -1}, 400, "max_tokens"),
    ({"max_tokens": 10**9}, 400, "max_tokens"),
    ({"max_tokens": "5"}, 400, "max_tokens"),
    ({"max_tokens": True}, 400, "max_tokens"),
    ({"temperature": float("nan")}, 400, "temperature"),
    ({"temperature": -3}, 400, "temperature"),
    ({"top_p": 0}, 400, "top_p"),
    ({"n": 17}, 400, "n"),
    ({"n": 0}, 400, "n"),
    ({"logprobs": 6}, 400, "logprobs"),
    ({"logprobs": True}, 400, "logprobs"),
    ({"best_of": 2}, 400, "best_of"),
    ({"presence_penalty": 0.5}, 400, "presence_penalty"),
    ({"stop": [""]}, 400, "stop"),
    ({"generation_config": "{}"}, 400, "generation_config"),
    ({"model": "another"}, 404, "model"),
    ({"model": None}, 400, "model"),
    (b"{", 400, None),
    (b"[" * 5000, 400, None),
    (b"\xff\xfe", 400, None),
    (b"null", 400, None),
    (b'{"prompt": "' + b"a" * 1_100_000 + b'"}', 413, None),
]


@pytest.mark.parametrize("kind", ["ours"], indirect=True)
def test_what_cannot_be_honored_is_refused_by_name(running):
    for change, status, field in BAD:
        body = change if isinstance(change, bytes) else {"model": "tiny", "prompt": "SECRET words"} | change
        got, told = post(running, body)
        assert (got, told["error"]["param"]) == (status, field), (change, told)
        assert "/" not in told["error"]["message"].replace("application/json", "").replace("/v1/", "")
        assert "Traceback" not in str(told) and "SECRET" not in str(told)
    assert post(running, {"model": "tiny", "messages": []}, "/v1/chat/completions")[0] == 400
    assert post(running, {}, "/v1/nothing")[0] == 404
    # What a web page of another origin may send without asking first.
    assert post(running, {"model": "tiny", "prompt": "a"}, **{"Content-Type": "text/plain"})[0] == 400
    assert post(running, {"model": "tiny", "prompt": "a", "max_tokens": 2})[0] == 200  # and it goes on
    assert running.engine.num_live == 0


ODD = (
    None,
    True,
    -1,
    0,
    2,
    1.5,
    1e308,
    10**30,
    "",
    "a",
    "\udfff",
    "\x00",
    [],
    [1],
    [None],
    ["a", 1],
    {},
    {"a": {"b": []}},
)
FIELDS = (
    "model",
    "prompt",
    "messages",
    "max_tokens",
    "temperature",
    "top_p",
    "seed",
    "stop",
    "stream_options",
    "n",
    "odd",
)


@pytest.mark.parametrize("kind", ["ours"], indirect=True)
def test_random_bodies_are_answered_or_refused_and_never_crash(running):
    random = Random(0)
    statuses = []
    for _ in range(200):
        path = random.choice(("/v1/completions", "/v1/chat/completions"))
        body = {"model": "tiny", "max_tokens": 2}
        turn = {"role": random.choice(("user", "tool", 1)), "content": random.choice(("hello", *ODD))}
        body |= {"prompt": "hello"} if path == "/v1/completions" else {"messages": [turn]}
        body |= {random.choice(FIELDS): random.choice(ODD) for _ in range(random.randint(0, 2))}
        cut = random.random() < 0.1
        status, told = post(running, json.dumps(body).encode()[: -random.randint(1, 9)] if cut else body, path)
        statuses.append(status)
        assert status in (200, 400, 404), (body, told)
        assert status == 200 or set(told["error"]) == {"message", "type", "param", "code"}
    assert statuses.count(200) > 10
    assert running.engine.num_live == 0 and running.engine.failure is None


@pytest.mark.parametrize("kind", ["ours"], indirect=True)
def test_models_health_and_metrics(running, client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    before = count_chosen(running)
    client.completions.create(model="tiny", prompt="abc", max_tokens=4, temperature=0)
    with urllib.request.urlopen(f"{running.url}/health") as answer:
        assert json.load(answer) == {"status": "ok"}
    with urllib.request.urlopen(f"{running.url}/metrics") as answer:
        page = answer.read().decode()
    for name in ("requests_total", "generated_tokens_total", "requests_waiting"):
        assert f"deepseek_moe_{name}" in page
    assert "gen_ai_server_time_to_first_token_seconds_bucket" in page
    # Three tokens of the prompt and three of the answer pass two MoE layers, and choose one to three experts in each.
    chosen = count_chosen(running) - before
    assert 2 * 6 <= chosen <= 2 * 6 * 3


def count_chosen(running):
    """Choices of all experts in all layers."""
    families = [family for family in running.service.metrics.registry.collect() if "expert_tokens" in family.name]
    assert [len(family.samples) for family in families] == [2 * 8]
    return sum(sample.value for sample in families[0].samples)
