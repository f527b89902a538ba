"""Blocks that are kept for replay: a uniform sample of each source, with a hash that notices a change."""

import numpy as np
import pytest
import torch

from deepseek_training.continual.elastic_weights import ElasticWeights
from deepseek_training.continual.reservoir import Reservoir, StoredBlocks
from modeling_deepseek import DeepseekConfig, DeepseekForCausalLM


def source(size, first=0):
    return StoredBlocks(np.arange(first, first + size, dtype=np.int32)[:, None].repeat(4, 1))


def filled(seed=0):
    found = Reservoir({}, {}, 60, "tokenizer")
    for number, size in enumerate((500, 20, 300)):
        found = found.add(f"source{number}", source(size, 1000 * number), seed=seed)
    return found


def test_every_source_has_its_places_and_no_more():
    found = filled()
    assert {name: len(blocks) for name, blocks in found.blocks.items()} == {
        "source0": 20,
        "source1": 20,
        "source2": 20,
    }
    assert found.num_seen == {"source0": 500, "source1": 20, "source2": 300}
    assert all(len(np.unique(blocks[:, 0])) == 20 for blocks in found.blocks.values())
    row = found.parts[0][3]["input_ids"]
    assert row.dtype == torch.int64 and row.shape == (4,)


def test_after_thinning_every_block_is_as_likely_as_any_other():
    """500 blocks, of which 60, then 30, then 20 stay: each in 4 % of the draws."""
    counts = np.zeros(500)
    for seed in range(500):
        counts[filled(seed).blocks["source0"][:, 0]] += 1
    expected = 500 * 20 / 500
    statistic = ((counts - expected) ** 2 / (expected * 0.96)).sum()
    assert 380 < statistic < 620  # chi-square of 499 degrees, four deviations


def test_the_file_gives_back_what_was_saved_and_tells_a_change(tmp_path):
    found = filled()
    assert Reservoir.load(tmp_path) is None
    found.save(tmp_path)
    again = Reservoir.load(tmp_path)
    assert again.identity == found.identity and again.num_seen == found.num_seen
    assert again.fits(["source0", "source1", "source2"], 60, 4) and not again.fits(["source0"], 60, 4)
    path = tmp_path / "replay.npz"
    with np.load(path) as file:
        content = dict(file)
    content["blocks1"] = content["blocks1"] + 1
    np.savez_compressed(path, **content)
    with pytest.raises(ValueError, match="is damaged or was changed"):
        Reservoir.load(tmp_path)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match="is damaged or was changed"):
        Reservoir.load(tmp_path)


def test_the_elastic_penalty_is_its_formula():
    torch.manual_seed(0)
    model = DeepseekForCausalLM(DeepseekConfig.from_preset("debug", vocab_size=61))
    blocks = StoredBlocks(np.random.default_rng(0).integers(3, 61, (3, 16)).astype(np.int32))
    elastic = ElasticWeights(model, blocks, weight=2.0, num_blocks=8)
    name = "model.layers.1.self_attn.o_proj.weight"
    fisher = torch.zeros_like(elastic.fisher[name])
    for block in blocks.blocks:
        ids = torch.from_numpy(block.astype(np.int64))[None]
        model.zero_grad()
        model.eval()(input_ids=ids, labels=ids).loss.backward()
        fisher += model.get_parameter(name).grad.square() / 3
    torch.testing.assert_close(elastic.fisher[name], fisher)
    weight = model.get_parameter(name)
    with torch.no_grad():
        weight += 0.1
    for value in model.parameters():
        value.grad = torch.zeros_like(value)
    elastic.on_pre_optimizer_step(None, None, None, model=model)
    torch.testing.assert_close(weight.grad, 2.0 * fisher * 0.1, rtol=1e-4, atol=1e-9)
