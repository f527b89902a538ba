"""ONNX graphs against the model they were made of, in onnxruntime."""

import contextlib
import io
import os
import re

import numpy as np
import pytest
import torch
from edge_models import PROMPTS, ROUTERS, differences, greedy, make_other, make_ours, make_tokenizer
from saved_families import FAMILIES

from deepseek_serving.edge.decoder_graph import MODEL_TYPES
from deepseek_serving.edge.onnx_decoder import OnnxDecoder, generate_without_cache, open_session, run_without_cache
from deepseek_serving.edge.onnx_export import export_onnx, write_graphs
from deepseek_training.data.texts import load_texts

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

NUM_NEW = 24
# (batch, cached, new): lengths 1 to 200, batches 1 to 4, both with and without a cache before.
SHAPES = ((1, 0, 1), (1, 1, 1), (1, 0, 200), (2, 7, 1), (4, 0, 33), (3, 150, 50), (4, 199, 1))
# fp32 in another order of operations, on logits of order 1.
TOLERANCE = 1e-4


def graph_of(model, folder) -> OnnxDecoder:
    write_graphs(model, folder, ("model.onnx",))
    return OnnxDecoder(folder / "model.onnx", prompt_chunk=16)


@pytest.mark.slow
def test_a_graph_with_a_cache_computes_what_the_model_does(tmp_path):
    model = make_ours(**ROUTERS["dynamic k"], num_hidden_layers=1, first_k_dense_replace=0)
    before = model.config._attn_implementation, model.config._experts_implementation
    decoder = graph_of(model, tmp_path)
    assert (model.config._attn_implementation, model.config._experts_implementation) == before
    assert max(differences(decoder, model, SHAPES)) < TOLERANCE
    logits, expert_weights, _ = decoder.step(np.array([[5, 6, 7]]), np.ones((1, 3), np.int64), decoder.empty_past())
    used = (expert_weights > 0).sum(-1)
    assert expert_weights.shape == (1, 1, 3, 8) and used.min() >= 1 and used.max() <= 4
    assert decoder.session.get_inputs()[0].shape == ["batch", "new"] and logits.std() > 0.5


@pytest.mark.slow
@pytest.mark.parametrize("router", ROUTERS)
def test_every_router(router, tmp_path):
    model = make_ours(**ROUTERS[router])
    assert max(differences(graph_of(model, tmp_path), model, SHAPES)) < TOLERANCE


def test_every_family_named_is_compared():
    assert {*FAMILIES, "deepseek_moe"} == {*MODEL_TYPES}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family, tmp_path):
    model = make_other(family)
    assert model.config.model_type == family
    decoder = graph_of(model, tmp_path)
    assert max(differences(decoder, model, SHAPES)) < TOLERANCE
    for ids in ([7], [9, 4, 300, 21, 5]):
        assert decoder.generate(ids, NUM_NEW) == greedy(model, ids, NUM_NEW)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("onnx") / "out"
    model = make_ours(**ROUTERS["dynamic k"])
    return model, folder, export_onnx(model, make_tokenizer(), folder, texts=load_texts("books", "validation"))


@pytest.mark.slow
@pytest.mark.xdist_group("onnx_export")
def test_greedy_text_of_20_prompts_with_and_without_a_cache(exported):
    model, folder, _ = exported
    decoder = OnnxDecoder.of_folder(folder)
    session = open_session(folder / "model_without_cache.onnx")
    assert len(PROMPTS) == 20
    for prompt in PROMPTS:
        ids = make_tokenizer()(prompt).input_ids
        wanted = greedy(model, ids, NUM_NEW)
        assert decoder.generate(ids, NUM_NEW) == wanted
        assert generate_without_cache(session, ids, NUM_NEW) == wanted
    for batch, length in ((1, 1), (4, 200), (3, 17)):
        ids = torch.randint(3, 400, (batch, length))
        with torch.no_grad():
            want = model(ids).logits.numpy()
        assert np.abs(run_without_cache(session, ids.numpy()) - want).max() < TOLERANCE


@pytest.mark.slow
@pytest.mark.xdist_group("onnx_export")
def test_int8_keeps_the_likeliest_token_and_its_experts_are_in_8_bits(exported):
    model, folder, measured = exported
    graph = onnx.load(folder / "model_int8.onnx").graph
    left = [
        tuple(one.dims) for one in graph.initializer if one.data_type == onnx.TensorProto.FLOAT and len(one.dims) > 1
    ]
    num_experts = model.config.n_routed_experts
    codes = [tuple(one.dims) for one in graph.initializer if one.data_type == onnx.TensorProto.UINT8]
    assert (num_experts, 64, 64) in codes and (num_experts, 64, 32) in codes
    # The router, and scales, an eighth of a byte per weight.
    assert sum(np.prod(shape) for shape in left) < 0.1 * sum(parameter.numel() for parameter in model.parameters())
    for name in ("model_int8.onnx", "model_without_cache_int8.onnx"):
        # Random weights make many near ties; of the demo's model it is above 98 % (docs/claims.yaml).
        assert measured[name].argmax_agreement >= 0.9
        assert measured[name].largest_logit_difference > 0
        assert measured[name].bits_per_byte == pytest.approx(measured[name].bits_per_byte_of_model, rel=0.01)
    sizes = [(folder / name).stat().st_size for name in ("model.onnx", "model_int8.onnx")]
    assert sizes[1] < 0.45 * sizes[0]


@pytest.mark.slow
@pytest.mark.xdist_group("onnx_export")
def test_the_readme_runs_as_printed(exported, monkeypatch):
    model, folder, _ = exported
    monkeypatch.chdir(folder)
    program = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[1]
    assert "{{" not in (folder / "README.md").read_text()
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(program.replace("model_int8.onnx", "model.onnx"), {})
    tokenizer = make_tokenizer()
    ids = tokenizer("Once upon a time").input_ids
    wanted = greedy(model, ids, 32)
    if 2 in wanted:
        wanted = wanted[: wanted.index(2)]
    assert printed.getvalue().strip() == tokenizer.decode(wanted, skip_special_tokens=True).strip()
    assert not (folder.parent / "out.partial").exists() and os.listdir(folder.parent) == ["out"]
