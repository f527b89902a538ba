"""The official client against the real server: answers equal transformers', whatever the batch; what is refused."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from queue import Queue
from random import Random

import numpy as np
import pytest
import torch
from endpoint_server import make_model, make_tokenizer
from triton_running import triton, triton_client

pytestmark = [pytest.mark.serving, pytest.mark.timeout(600)]
KINDS = ("score", "embed", "reward", "safety", "generate")
ALPHABET = "abcdefghij KLMNOP,.\u00e4\u4f60"


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    triton_client("grpc")
    with triton(tmp_path_factory.mktemp("triton"), KINDS) as (process, _):
        yield process


@pytest.fixture
def grpc(running):
    module = triton_client("grpc")
    client = module.InferenceServerClient(f"127.0.0.1:{running.listening.grpc_port}")
    yield client
    client.close()


def strings(module, name, values):
    """An input of shape `[B, 1]`, or `[1]` of one string."""
    array = np.array([value.encode() for value in values], dtype=np.object_)
    array = array[:, None] if isinstance(values, list) else array
    tensor = module.InferInput(name, list(array.shape), "BYTES")
    tensor.set_data_from_numpy(array)
    return tensor


def make_texts(number):
    random = Random(0)
    return ["".join(random.choices(ALPHABET, k=random.randint(2, 60))) for _ in range(number)]


def log_likelihood(model, text):
    ids = torch.tensor([make_tokenizer()(text)["input_ids"]])
    with torch.inference_mode():
        logps = model(input_ids=ids).logits[0].log_softmax(-1)
    return float(logps[:-1].gather(-1, ids[0, 1:, None]).sum())


def test_scores_of_mixed_texts_equal_transformers_over_both_protocols(running, grpc):
    """160 texts by 16 clients; the batches are larger than one request, as Triton's own counts say."""
    module, web = triton_client("grpc"), triton_client("http")
    texts = make_texts(160)
    before = count(running, "score")

    def ask(number):
        text = texts[number]
        if number % 2:
            told = grpc.infer("score", [strings(module, "text", [text])])
        else:
            with web.InferenceServerClient(f"127.0.0.1:{running.listening.http_port}") as client:
                told = client.infer("score", [strings(web, "text", [text])])
        return float(told.as_numpy("log_likelihood")[0, 0]), int(told.as_numpy("num_tokens")[0, 0])

    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(ask, range(160)))
    model = make_model("ours")
    for text, (score, num_tokens) in zip(texts, found, strict=True):
        assert score == pytest.approx(log_likelihood(model, text), abs=2e-4)
        assert num_tokens == len(make_tokenizer()(text)["input_ids"]) - 1
    inferences, executions = (after - first for after, first in zip(count(running, "score"), before, strict=True))
    assert inferences == 160 and inferences / executions > 2


def count(running, name):
    """Inferences and executions of a model, as Triton counts them."""
    stats = running.ask("GET", f"/v2/models/{name}/stats")["model_stats"][0]
    return int(stats["inference_count"]), int(stats["execution_count"])


def test_rows_of_one_request_and_a_context(running, grpc):
    module, model = triton_client("grpc"), make_model("ours")
    texts, contexts = ["end.", "x y z", "\u4f60"], ["The ", "a", "long " * 9]
    told = grpc.infer("score", [strings(module, "text", texts), strings(module, "context", contexts)])
    for row, (context, text) in enumerate(zip(contexts, texts, strict=True)):
        whole = log_likelihood(model, context + text) - log_likelihood(model, context)
        assert float(told.as_numpy("log_likelihood")[row, 0]) == pytest.approx(whole, abs=3e-4)


def test_embeddings_rewards_and_safety(running, grpc):
    module = triton_client("grpc")
    texts = make_texts(5)
    vectors = grpc.infer("embed", [strings(module, "text", texts)]).as_numpy("embedding")
    model, tokenizer = make_model("ours"), make_tokenizer()
    for text, vector in zip(texts, vectors, strict=True):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.inference_mode():
            hidden = model.model(input_ids=ids).last_hidden_state[0].mean(0)
        assert np.allclose(vector, (hidden / hidden.norm()).numpy(), atol=1e-5)
    rewards = grpc.infer("reward", [strings(module, "text", texts)]).as_numpy("reward")
    assert rewards.shape == (5, 1) and len(set(rewards.ravel().tolist())) == 5
    alone = [grpc.infer("reward", [strings(module, "text", [text])]).as_numpy("reward")[0, 0] for text in texts]
    assert np.allclose(rewards[:, 0], alone, atol=1e-5)
    said = ["Thank you for the lovely soup.", "You filthy vermin, I will kill you all."]
    told = grpc.infer("safety", [strings(module, "text", said)])
    assert [label.decode() for label in told.as_numpy("label")[:, 0]] == ["safe", "unsafe"]
    assert np.allclose(told.as_numpy("scores").sum(-1), 1.0, atol=1e-5)


def greedy(model, prompt, num_tokens):
    tokenizer = make_tokenizer()
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    written = model.generate(ids, max_new_tokens=num_tokens, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
    return tokenizer.decode(written, skip_special_tokens=True), len(written)


def generation_inputs(module, prompt, **fields):
    kinds = {"max_tokens": ("INT32", np.int32), "temperature": ("FP32", np.float32), "stream": ("BOOL", np.bool_)}
    inputs = [strings(module, "prompt", (prompt,))]
    for name, value in fields.items():
        kind, dtype = kinds[name]
        tensor = module.InferInput(name, [1], kind)
        tensor.set_data_from_numpy(np.array([value], dtype=dtype))
        inputs.append(tensor)
    return inputs


def stream(running, prompts, **fields):
    """All responses of several requests on one gRPC stream, by request."""
    module = triton_client("grpc")
    got, done = Queue(), threading.Event()
    with module.InferenceServerClient(f"127.0.0.1:{running.listening.grpc_port}") as client:
        client.start_stream(lambda result, error: got.put((result, error)))
        for number, prompt in enumerate(prompts):
            inputs = generation_inputs(module, prompt, **fields)
            client.async_stream_infer("generate", inputs, request_id=str(number), enable_empty_final_response=True)
        pieces, num_ended = {str(number): [] for number in range(len(prompts))}, 0
        while num_ended < len(prompts):
            result, error = got.get(timeout=60)
            assert error is None, error
            response = result.get_response()
            if response.outputs:
                pieces[response.id].append(result)
            num_ended += response.parameters["triton_final_response"].bool_param
        client.stop_stream()
    done.set()
    return [pieces[str(number)] for number in range(len(prompts))]


def test_streamed_and_whole_generations_equal_generate(running):
    prompts = [text[:40] for text in make_texts(8)]
    model = make_model("ours")
    for prompt, pieces in zip(
        prompts, stream(running, prompts, max_tokens=24, temperature=0, stream=True), strict=True
    ):
        text, num_tokens = greedy(model, prompt, 24)
        assert "".join(piece.as_numpy("text")[0].decode() for piece in pieces) == text
        assert int(pieces[-1].as_numpy("completion_tokens")[0]) == num_tokens
        assert pieces[-1].as_numpy("finish_reason")[0] in (b"length", b"stop")
    with ThreadPoolExecutor(8) as pool:
        body = {"max_tokens": 24, "temperature": 0}
        path = "/v2/models/generate/generate"
        found = list(pool.map(lambda prompt: running.ask("POST", path, body | {"prompt": prompt}), prompts))
    for prompt, told in zip(prompts, found, strict=True):
        assert (told["text"], told["completion_tokens"]) == greedy(model, prompt, 24)


def infer_body(data, *, shape=None, datatype="BYTES", name="text", **more):
    shape = [1, 1] if shape is None else shape
    return {"inputs": [{"name": name, "shape": shape, "datatype": datatype, "data": data}]} | more


BAD = [
    ("score/infer", infer_body([""]), 400),
    ("score/infer", infer_body(["x" * 300]), 400),
    ("score/infer", infer_body(["x" * 1_100_000]), 400),
    ("score/infer", infer_body([1], datatype="INT32"), 400),
    ("score/infer", infer_body(["a"], shape=[1]), 400),
    ("score/infer", infer_body(["a"], shape=[1, 2]), 400),
    ("score/infer", infer_body(["a"], shape=[-1, 1]), 400),
    ("score/infer", infer_body(["a"], shape=[0, 1]), 400),
    ("score/infer", infer_body(["a"] * 40, shape=[40, 1]), 400),
    ("score/infer", infer_body(["a"], name="unknown"), 400),
    ("score/infer", {"inputs": []}, 400),
    ("score/infer", {"inputs": 3}, 400),
    ("score/infer", [], 400),
    ("reward/infer", infer_body([""]), 400),
    ("embed/infer", infer_body([None]), 400),
    ("safety/infer", infer_body(["\u0645\u0631\u062d\u0628\u0627"]), 400),
    ("nothing/infer", infer_body(["a"]), 400),
    ("generate/generate", {"prompt": ""}, 400),
    ("generate/generate", {"prompt": "a", "max_tokens": 0}, 400),
    ("generate/generate", {"prompt": "a", "max_tokens": 10**6}, 400),
    ("generate/generate", {"prompt": "a", "max_tokens": "many"}, 400),
    ("generate/generate", {"prompt": "a", "temperature": -3}, 400),
    ("generate/generate", {"prompt": "x" * 300}, 400),
    ("generate/generate", {"max_tokens": 3}, 400),
    ("generate/generate", {"prompt": ["a", "b"]}, 400),
    ("generate/generate", {"prompt": "a", "stop": ["", "b"]}, 400),
    ("generate/generate", {"prompt": "a", "stop": ["a"] * 9}, 400),
]


def test_malformed_requests_are_refused_and_leak_nothing(running):
    from deepseek_serving.triton_server.process import TritonRefusedError

    stubs = running.stubs()
    for path, body, status in BAD:
        with pytest.raises(TritonRefusedError) as refused:
            running.ask("POST", f"/v2/models/{path}", body)
        told = str(refused.value)
        # Triton's own parser answers 500 to some of what it cannot read.
        expected = (status, 404, 500) if told.startswith("Unable to parse") else (status, 404)
        assert refused.value.status in expected, (path, str(body)[:80], told)
        for part in ("Traceback", ".py", "/work", "/tmp", "/root", "site-packages", str(running.repository)):
            assert part not in told, (path, told)
    assert running.stubs() == stubs
    assert running.ask("POST", "/v2/models/score/infer", infer_body(["abc"]))["outputs"]


def test_random_bodies_crash_nothing(running):
    from deepseek_serving.triton_server.process import TritonRefusedError

    random, stubs, statuses = Random(1), running.stubs(), []
    odd = (None, True, -1, 0, 1.5, 10**30, "", "a", "\udfff", "\x00", [], [None], {}, {"a": [1]}, [["a"]], [[]])
    for _ in range(200):
        name = random.choice(("score", "embed", "reward", "safety", "generate"))
        body = infer_body(["hello"], name=random.choice(("text", "context", "prompt")))
        tensor = body["inputs"][0]
        for key in random.sample(sorted(tensor), random.randint(0, 2)):
            tensor[key] = random.choice((*odd, [1, 1], ["hello", "b"], "INT64", "FP32"))
        if random.random() < 0.2:
            body[random.choice(("parameters", "outputs", "id", "odd"))] = random.choice(odd)
        if name == "generate":
            body = {"prompt": "a", "max_tokens": 2} | {
                random.choice(("prompt", "stop", "seed", "odd")): random.choice(odd)
            }
        path = f"/v2/models/{name}/{'generate' if name == 'generate' else 'infer'}"
        try:
            running.ask("POST", path, body)
            statuses.append(200)
        except TritonRefusedError as error:
            statuses.append(error.status)
            assert "Traceback" not in str(error) and ".py" not in str(error), (path, json.dumps(body), str(error))
    assert statuses.count(200) > 5 and set(statuses) <= {200, 400, 500}
    assert running.stubs() == stubs


def test_clients_cannot_control_the_server(running):
    from deepseek_serving.triton_server.process import TritonRefusedError

    for path in (
        "repository/index",
        "repository/models/score/unload",
        "repository/models/score/load",
        "systemsharedmemory/region/x/register",
        "logging",
        "trace/setting",
    ):
        with pytest.raises(TritonRefusedError) as refused:
            running.ask("POST", f"/v2/{path}", {})
        assert refused.value.status == 403
    with pytest.raises(TritonRefusedError):
        running.ask("GET", "/v2/models/score/config")
    grpc = triton_client("grpc")
    with grpc.InferenceServerClient(f"127.0.0.1:{running.listening.grpc_port}") as client:
        assert client.is_model_ready("score")
        with pytest.raises(triton_client("utils").InferenceServerException, match="restricted"):
            client.unload_model("score")
