"""The program in ExecuTorch's own runtime, with its cache, against transformers.

Needs ExecuTorch: `make edge-setup` puts it into build/edge/executorch, `make test-edge` runs this with it.
"""

import contextlib
import io
import re

import numpy as np
import pytest
from edge_models import PROMPTS, ROUTERS, greedy, make_other, make_ours, make_tokenizer

from deepseek_serving.edge.executorch_export import ExecutorchDecoder, export_executorch, write_program
from deepseek_serving.edge.measurement import forward_of
from deepseek_training.data.texts import load_texts

pytest.importorskip("executorch.runtime", reason="ExecuTorch is not on the path; make test-edge runs this with it")
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("executorch")]
NUM_NEW = 24


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("executorch") / "out"
    model = make_ours(**ROUTERS["dynamic k"])
    texts = load_texts("books", "validation")
    return model, folder, export_executorch(model, make_tokenizer(), folder, texts=texts, cache_tokens=128)


def test_greedy_text_of_20_prompts(exported):
    model, folder, agreement = exported
    assert agreement.argmax_agreement == 1.0 and agreement.largest_logit_difference < 1e-4
    decoder = ExecutorchDecoder(folder / "model.pte")
    assert len(PROMPTS) == 20
    for prompt in PROMPTS:  # one after another in one cache: what a text left there is not read by the next
        ids = make_tokenizer()(prompt).input_ids
        assert decoder.generate(ids, NUM_NEW) == greedy(model, ids, NUM_NEW)


def test_the_readme_runs_as_printed(exported, monkeypatch):
    model, folder, _ = exported
    monkeypatch.chdir(folder)
    program = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[1]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(program, {})
    wanted = greedy(model, make_tokenizer()("Once upon a time").input_ids, 32)
    wanted = wanted[: wanted.index(2)] if 2 in wanted else wanted
    assert printed.getvalue().strip() == make_tokenizer().decode(wanted, skip_special_tokens=True).strip()


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_other_families(family, tmp_path):
    model = make_other(family)
    write_program(model, tmp_path / "model.pte", 64)
    ids = np.array([9, 4, 300, 21, 5])
    assert np.abs(ExecutorchDecoder(tmp_path / "model.pte").read(ids) - forward_of(model)(ids)).max() < 1e-4


def test_a_cache_longer_than_the_context_is_refused(tmp_path):
    model = make_ours(**ROUTERS["softmax"])
    with pytest.raises(ValueError, match="--cache-tokens: got 257, expected 1 to the model's context of 256"):
        export_executorch(model, make_tokenizer(), tmp_path / "out", texts=["a"], cache_tokens=257)
