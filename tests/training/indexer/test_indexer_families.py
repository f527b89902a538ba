"""Every family of the installed transformers that has an indexer: trained, or refused with the reason."""

import pytest
import torch
from indexer_models import build, families_with_an_indexer, indexer_parameters, layers_of
from tiny_families import loss_of, token_ids

from deepseek_training.indexer import IndexerTrainingCallback

REFUSED = {
    "minimax_m3_vl": "indexer: got MiniMaxM3VLIndexer, expected one that scores keys and keeps index_topk",
    "qwen4_exp": "indexer: got Qwen4ExpTextQSAIndexer, expected one that scores keys and keeps index_topk",
}
TRAINED = sorted(families_with_an_indexer().keys() - REFUSED.keys())
IDS = token_ids(2, 24)


def gradients(model, callback=None, step=0):
    if callback is not None:
        callback.begin(model)
        callback.begin_step(model, step)
    loss_of(model, IDS).backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    figures = {}
    if callback is not None:
        figures = callback._observer.figures
        callback.end()
    model.zero_grad(set_to_none=True)
    return found, figures


def test_the_families_that_the_issue_names_are_among_them():
    assert {"deepseek_v32", "deepseek_v4", "glm_moe_dsa", "glm5_next"} <= set(TRAINED)


@pytest.mark.parametrize("family", REFUSED)
def test_others_are_refused_with_the_reason(family):
    with pytest.raises(ValueError, match=REFUSED[family]) as error:
        IndexerTrainingCallback().begin(build(family))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("family", TRAINED)
def test_no_tensor_without_a_gradient_and_the_main_models_as_they_were(family):
    model = build(family)
    alone, _ = gradients(model)
    names = indexer_parameters(model).keys()
    assert names and all(alone[name] is None for name in names)
    found, figures = gradients(model, IndexerTrainingCallback(warmup_steps=1), step=1)
    assert [name for name, gradient in found.items() if gradient is None] == []
    assert all(found[name].abs().max() > 0 for name in names)
    assert all(torch.equal(found[name], alone[name]) for name in found.keys() - names)
    assert figures["kl_count"] == len(layers_of(model)) and figures["kl"] > 0 and "recall" not in figures


@pytest.mark.parametrize("family", TRAINED)
def test_in_the_warm_up_only_the_indexer_is_trained_on_dense_attention(family):
    model = build(family)
    budgets = [layer.indexer.index_topk for layer in layers_of(model)]
    callback = IndexerTrainingCallback(warmup_steps=1)
    found, figures = gradients(model, callback)
    names = indexer_parameters(model).keys()
    assert all(found[name] is None for name in found.keys() - names)
    assert all(found[name].abs().max() > 0 for name in names)
    assert figures["recall_count"] > 0 and 0 < figures["recall"] / figures["recall_count"] < 1
    assert [layer.indexer.index_topk for layer in layers_of(model)] == budgets
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("family", TRAINED)
def test_the_warm_up_lets_the_attention_see_everything(family):
    """The logits of a training pass are those of a model whose budget no query exceeds."""
    model = build(family)
    sparse = loss_of(model, IDS).item()
    callback = IndexerTrainingCallback(warmup_steps=1)
    callback.begin(model)
    callback.begin_step(model, 0)
    dense = loss_of(model, IDS).item()
    assert loss_of(model.eval(), IDS).item() == pytest.approx(sparse, abs=1e-6)  # evaluation stays as it is used
    callback.end()
    for layer in layers_of(model):
        layer.indexer.index_topk = 24
    assert loss_of(model, IDS).item() == pytest.approx(dense, abs=1e-6)
    assert dense != pytest.approx(sparse, abs=1e-6)
