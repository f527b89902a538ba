"""vLLM on a CPU continues an exported checkpoint as transformers does, and its server can be evaluated.

`make serve-setup-vllm` installs it. A Llama goes first: it tells whether vLLM itself computes right here.
"""

import json
import subprocess
from pathlib import Path
from random import Random

import pytest
import torch
from scored_samples import assert_scored_alike, read_rows
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from deepseek_cli.benchmarks import serving, serving_peers
from deepseek_cli.main import main

pytestmark = [pytest.mark.serving, pytest.mark.slow, pytest.mark.timeout(900)]
NUM_PROMPTS, NUM_TOKENS = 64, 24


def save_llama(folder):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.1, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


def ask_vllm(model, prompts, folder):
    """Tokens and their log-probabilities of each prompt."""
    try:
        python = serving_peers.find_vllm()
    except serving_peers.AbsentError as error:
        pytest.skip(str(error))
    request = {"prompts": prompts, "max_tokens": NUM_TOKENS, "max_model_len": 256}
    (folder / "request.json").write_text(json.dumps(request))
    script = Path(serving.__file__).with_name("vllm_generate.py")
    command = [str(python), "-P", str(script), str(model), str(folder / "request.json"), str(folder / "answer.json")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads((folder / "answer.json").read_text())["answers"]


@torch.inference_mode()
def continue_alone(model, prompt):
    ids = torch.tensor([prompt])
    written = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=NUM_TOKENS, do_sample=False, pad_token_id=0,
        output_scores=True, return_dict_in_generate=True,
    )  # fmt: skip
    tokens = written.sequences[0, len(prompt) :].tolist()
    scores = zip(written.scores, tokens, strict=True)
    return tokens, [float(step[0].log_softmax(-1)[token]) for step, token in scores]


@pytest.mark.parametrize("save", [save_llama, serving.build_model], ids=["llama", "exported"])
def test_64_prompts_get_the_same_greedy_tokens(tmp_path, save):
    save(tmp_path / "model")
    random = Random(0)
    prompts = [[random.randrange(3, 1024) for _ in range(random.randrange(1, 60))] for _ in range(NUM_PROMPTS)]
    answers = ask_vllm(tmp_path / "model", prompts, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    for prompt, told in zip(prompts, answers, strict=True):
        tokens, logps = continue_alone(model, prompt)
        assert told["tokens"] == tokens
        assert told["logps"] == pytest.approx(logps, abs=1e-4)
    assert len({tuple(told["tokens"]) for told in answers}) > NUM_PROMPTS // 2


@pytest.mark.parametrize("task", ["mmlu", "bits_per_byte", "humaneval"])
def test_its_server_is_scored_as_the_checkpoint(tmp_path, task):
    """`evaluate URL` over vLLM's HTTP: the same answers and texts, log-likelihoods equal up to rounding."""
    serving.build_model(tmp_path / "model")
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": f"{n} nodes. " * 40}) + "\n" for n in range(3)))
    own = ["--data", str(tmp_path / "text.jsonl")] if task == "bits_per_byte" else []
    words = ["--tasks", task, "--limit", "2", "--max-length", "200", "--max-new-tokens", "8", *own, "--output"]
    assert main(["evaluate", str(tmp_path / "model"), *words, str(tmp_path / "local")]) == 0
    try:
        with serving_peers.vllm_server(str(tmp_path / "model")) as port:
            served = ["evaluate", f"http://127.0.0.1:{port}/v1", "--tokenizer", str(tmp_path / "model")]
            assert main([*served, *words, str(tmp_path / "served")]) == 0
    except serving_peers.AbsentError as error:
        pytest.skip(str(error))
    assert_scored_alike(read_rows(tmp_path / "local", task), read_rows(tmp_path / "served", task))
