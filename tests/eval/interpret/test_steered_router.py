"""A masked expert takes no token and the rest is chosen as the router would; held choices change no output."""

import pytest
import torch
from tiny_moe import FAMILIES, make_model, make_passages

from deepseek_eval.interpret.ablation import score_passages
from deepseek_eval.interpret.attributions import Reading
from deepseek_eval.interpret.routed_tokens import choice_of, find_layers, read_routing
from deepseek_eval.interpret.steered_router import masked_expert


@pytest.mark.parametrize("family", FAMILIES)
def test_a_masked_expert_takes_no_token_and_the_model_is_left_as_it_was(family):
    model, passages = make_model(family), make_passages()
    layers = find_layers(model)
    before, routed = score_passages(model, passages), read_routing(model, passages)
    assert (routed.experts[1] == 2).any()
    with masked_expert(layers[1], 2):
        masked = read_routing(model, passages)
        changed = score_passages(model, passages)
    assert not (masked.experts[1] == 2).any()
    assert (masked.experts[0] == routed.experts[0]).all()  # the layer below saw nothing
    assert not (changed == before).all()
    assert (score_passages(model, passages) == before).all()


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_the_rest_is_chosen_and_weighed_as_by_hand(family):
    layer = find_layers(make_model(family))[0]
    hidden = torch.randn(40, 32)
    with masked_expert(layer, 3), torch.no_grad():
        choice = choice_of(layer, layer.router(hidden))
    others = [0, 1, 2, 4, 5]
    values, places = (hidden @ layer.router.weight[others].T).softmax(-1).topk(2, dim=-1)
    assert torch.equal(choice.topk_indices, torch.tensor(others)[places])
    torch.testing.assert_close(choice.topk_weights, (values / values.sum(-1, keepdim=True)).detach())


def test_of_a_router_with_a_bias_it_is_as_if_the_bias_were_very_low():
    model = make_model("deepseek_v3")
    layer, hidden = find_layers(model)[0], torch.randn(40, 32)
    with masked_expert(layer, 1), torch.no_grad():
        _, weights, indices = layer.router(hidden)
    layer.router.e_score_correction_bias[1] = -100.0
    with torch.no_grad():
        _, expected_weights, expected = layer.router(hidden)
    order, expected_order = indices.argsort(-1), expected.argsort(-1)
    # With three in a group, the worth of the masked expert's group is of its two others in both.
    assert torch.equal(indices.gather(1, order), expected.gather(1, expected_order))
    torch.testing.assert_close(weights.gather(1, order), expected_weights.gather(1, expected_order))


@pytest.mark.parametrize("family", FAMILIES)
def test_held_choices_change_nothing_on_the_text_itself(family):
    model, passage = make_model(family), make_passages()[0]
    reading = Reading(model, passage.token_ids)
    with torch.no_grad():
        free = reading.next_token_target(reading.embeddings.unsqueeze(0))
        with reading.held():
            held = reading.next_token_target(reading.embeddings.repeat(3, 1, 1))
            other = read_routing(model, [make_passages()[1]])
    torch.testing.assert_close(held, free.expand(3), rtol=0, atol=1e-5)
    # Another text of the same length goes where the first went.
    first = read_routing(model, [passage])
    assert all((set(a) - {-1}) == (set(b) - {-1}) for a, b in zip(first.experts[0], other.experts[0], strict=True))


def test_what_cannot_be_is_refused_in_one_line():
    model = make_model("mixtral")
    layer = find_layers(model)[0]
    with pytest.raises(ValueError, match="expert: got 6, expected 0 to 5"), masked_expert(layer, 6):
        pass
    layer.router.top_k = 6
    with pytest.raises(ValueError, match="can do without"), masked_expert(layer, 2):
        score_passages(model, make_passages())
    with pytest.raises(ValueError, match="a dense model"):
        find_layers(torch.nn.Linear(2, 2))
