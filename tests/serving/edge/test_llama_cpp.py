"""The GGUF file in llama.cpp: greedy text against transformers.

Needs xllamacpp, which brings llama.cpp ready built: `make edge-setup` puts it into build/edge/llama_cpp.
`tests/serving/test_gguf_llama_cpp.py` compares logits too, by another package that has to be compiled.
"""

import pytest
from edge_models import PROMPTS, ROUTERS, greedy, make_ours, make_tokenizer

from deepseek_cli.benchmarks.edge_runner import load_llama_cpp
from deepseek_serving.gguf_export import export_gguf

pytest.importorskip("xllamacpp", reason="llama.cpp is not on the path; make test-edge runs this with it")
pytest.importorskip("gguf")
pytestmark = pytest.mark.slow
NUM_NEW = 24


@pytest.mark.parametrize("router", ["sigmoid", "softmax"])
def test_greedy_text_of_20_prompts(router, tmp_path):
    settings = {key: value for key, value in ROUTERS[router].items() if key != "norm_type"}
    model, tokenizer = make_ours(**settings), make_tokenizer()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    write = load_llama_cpp(export_gguf(tmp_path / "model", tmp_path / "model.gguf"))()
    ends = 0
    for prompt in PROMPTS:
        ids = tokenizer(prompt).input_ids
        wanted = greedy(model, ids, NUM_NEW)
        assert write(ids, NUM_NEW) == wanted, prompt
        ends += tokenizer.eos_token_id in wanted[:-1]
    assert router != "sigmoid" or ends  # some text goes on behind an end token
