"""Cutting a model: what is kept is the teacher's bit for bit, and what is cut away is what did not matter.

Witnesses: a teacher whose router is masked in place of being cut, channels and experts that are zero by construction,
and a loop over tokens for the saliencies.
"""

import copy

import pytest
import torch
import torch.nn.functional as F

from deepseek_training.compress.expert_saliency import ExpertSaliency
from deepseek_training.compress.importance import measure_importance
from deepseek_training.compress.selection import keep_best
from deepseek_training.compress.shrink import shrink
from deepseek_training.compress.student_config import obstacles_to_shrink, student_config
from modeling_deepseek import DeepseekConfig, DeepseekForCausalLM
from modeling_deepseek.families import find_moe_layers

FIXED = {"min_experts_per_tok": None, "target_experts_per_tok": None}


def teacher_of(seed=0, **settings):
    """A model with weights large enough that every part has a say."""
    torch.manual_seed(seed)
    settings = {"vocab_size": 64, "hidden_size": 32, "tie_word_embeddings": False, "n_shared_experts": 2, **settings}
    model = DeepseekForCausalLM(DeepseekConfig.from_preset("debug", **settings)).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.dim() > 1:
                value.normal_(std=1.0 if "embed" in name else value.shape[-1] ** -0.5)
            else:
                value.copy_(1 + 0.1 * torch.randn_like(value))
        for name, value in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                value.normal_(std=0.05)
    return model


@pytest.fixture
def blocks():
    return torch.randint(3, 64, (6, 20), generator=torch.Generator().manual_seed(1))


def cut(model, blocks, *, experts_by="reap", **settings):
    config = student_config(model.config, settings)
    return shrink(model, config, measure_importance(model, blocks), experts_by=experts_by)


def logits(model, blocks):
    with torch.no_grad():
        return model(input_ids=blocks, use_cache=False).logits


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"q_lora_rank": 24, "norm_type": "layernorm", "router_key_dim": 8},
        {"tie_word_embeddings": True, "n_group": 4, "topk_group": 3, "first_k_dense_replace": 0},
    ],
)
def test_the_same_configuration_gives_the_same_model(settings, blocks):
    teacher = teacher_of(**settings)
    before = copy.deepcopy(teacher.state_dict())
    student = cut(teacher, blocks)
    assert {**student.config.to_dict(), "dtype": None} == teacher.config.to_dict()
    assert student.state_dict().keys() == before.keys()
    for name, value in before.items():
        assert torch.equal(student.state_dict()[name], value), name
        assert torch.equal(teacher.state_dict()[name], value), name
    assert torch.equal(logits(student, blocks), logits(teacher, blocks))


def mask_experts(router, dropped):
    compute = router.compute_logits
    router.compute_logits = lambda hidden: compute(hidden).masked_fill(dropped, float("-inf"))
    router.e_score_correction_bias.masked_fill_(dropped, float("-inf"))


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("more", [{}, {"n_group": 2, "topk_group": 2}, {"scoring_func": "softmax"}])
def test_fewer_experts_are_the_teacher_with_the_others_masked(more, dynamic, blocks):
    """The witness sets logits and bias of the experts that are cut to -inf and slices nothing."""
    teacher = teacher_of(**more, **({} if dynamic else FIXED))
    student = cut(teacher, blocks, n_routed_experts=4)
    masked = copy.deepcopy(teacher)
    for ours, theirs in zip(find_moe_layers(student), find_moe_layers(masked), strict=True):
        rows = ours.router.weight.unsqueeze(1) == theirs.router.weight.unsqueeze(0)
        kept = rows.all(-1).any(0)
        assert kept.sum() == 4
        if more.get("n_group"):
            assert kept[:4].sum() == kept[4:].sum() == 2, "groups lose equally"
        mask_experts(theirs.router, ~kept)
    torch.testing.assert_close(logits(student, blocks), logits(masked, blocks), atol=1e-5, rtol=1e-5)
    assert (logits(student, blocks) - logits(teacher, blocks)).abs().max() > 1e-2


def kill_channels(teacher, dead):
    """Nothing is ever in these channels of the hidden state: nobody writes them."""
    with torch.no_grad():
        for name, value in teacher.named_parameters():
            if name.endswith("embed_tokens.weight") or name.endswith("experts.down_proj"):
                value[:, dead] = 0
            elif name.endswith(("o_proj.weight", "down_proj.weight")):
                value[dead] = 0


def test_dead_hidden_channels_are_the_ones_cut(blocks):
    """The norms see fewer channels, which makes their mean squares larger: the weights make up for it exactly."""
    teacher = teacher_of(rms_norm_eps=1e-12)
    dead = torch.tensor([0, 3, 7, 8, 20, 21, 22, 31])
    kill_channels(teacher, dead)
    student = cut(teacher, blocks, hidden_size=24)
    alive = [channel for channel in range(32) if channel not in dead]
    assert torch.equal(student.model.embed_tokens.weight, teacher.model.embed_tokens.weight[:, alive])
    torch.testing.assert_close(logits(student, blocks), logits(teacher, blocks), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_dead_inner_channels_heads_and_experts_are_the_ones_cut(blocks):
    teacher = teacher_of(**FIXED, num_experts_per_tok=2, num_attention_heads=4, num_key_value_heads=4)
    for layer in teacher.model.layers:
        layer.self_attn.o_proj.weight[:, 32:64] = 0  # the second head
        if not layer.is_moe:
            layer.mlp.down_proj.weight[:, 5:69] = 0
            continue
        layer.mlp.shared_experts.down_proj.weight[:, 40:72] = 0
        layer.mlp.experts.down_proj[:, :, 10:26] = 0
        layer.mlp.gate.e_score_correction_bias[2] = -10.0  # never chosen
    smaller = {"num_attention_heads": 3, "intermediate_size": 64, "moe_intermediate_size": 32, "n_routed_experts": 7}
    student = cut(teacher, blocks, **smaller)
    torch.testing.assert_close(logits(student, blocks), logits(teacher, blocks), atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("norm_type", ["rmsnorm", "layernorm"])
def test_dead_latents_are_the_ones_cut(norm_type, blocks):
    """With LayerNorm a latent is dead where it is at the mean of all; then nothing but the spread is lost."""
    teacher = teacher_of(q_lora_rank=16, norm_type=norm_type)
    for layer in teacher.model.layers:
        attention = layer.self_attn
        for proj, norm, width in (("kv_a_proj_with_mqa", "kv_a_layernorm", 32), ("q_a_proj", "q_a_layernorm", 16)):
            weight = getattr(attention, proj).weight
            weight[: width // 4] = 0
            if norm_type == "layernorm":
                weight[width // 4 : width] -= weight[width // 4 : width].mean(0)
                getattr(attention, norm).bias.zero_()
    student = cut(teacher, blocks, q_lora_rank=12, kv_lora_rank=24)
    torch.testing.assert_close(logits(student, blocks), logits(teacher, blocks), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_the_layer_that_changes_nothing_is_the_one_cut(blocks):
    teacher = teacher_of(num_hidden_layers=4)
    idle = teacher.model.layers[2]
    for part in (idle.self_attn.o_proj.weight, idle.mlp.experts.down_proj, idle.mlp.shared_experts.down_proj.weight):
        part.zero_()
    student = cut(teacher, blocks, num_hidden_layers=3)
    torch.testing.assert_close(logits(student, blocks), logits(teacher, blocks))


@torch.no_grad()
def test_the_order_of_experts_and_channels_changes_nothing(blocks):
    teacher = teacher_of()
    shuffled = copy.deepcopy(teacher)
    generator = torch.Generator().manual_seed(3)
    for layer in find_moe_layers(shuffled):
        order = torch.randperm(8, generator=generator)
        for tensor in (layer.experts.gate_up_proj, layer.experts.down_proj, layer.router.weight, layer.bias):
            tensor.copy_(tensor[order].clone())
        inner = torch.randperm(48, generator=generator)
        gate, up = layer.experts.gate_up_proj.chunk(2, dim=1)
        layer.experts.gate_up_proj.copy_(torch.cat([gate[:, inner], up[:, inner]], 1))
        layer.experts.down_proj.copy_(layer.experts.down_proj[:, :, inner].clone())
    smaller = {"n_routed_experts": 5, "moe_intermediate_size": 32}
    one, other = cut(teacher, blocks, **smaller), cut(shuffled, blocks, **smaller)
    torch.testing.assert_close(logits(one, blocks), logits(other, blocks), atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["fused_moe", "eager"])
@pytest.mark.parametrize("more", [{}, {"n_group": 2, "topk_group": 1}, {"routed_scaling_factor": 2.5, **FIXED}])
def test_saliencies_are_those_of_a_loop_over_tokens(more, implementation, blocks):
    teacher = teacher_of(**more)
    teacher.set_experts_implementation(implementation)
    (layer, *_) = find_moe_layers(teacher)
    layer.router.e_score_correction_bias[5] = -10.0  # an expert that no token comes to
    seen = []
    layer.experts.register_forward_pre_hook(lambda module, args: seen.append(args))
    saliency = ExpertSaliency(layer, 8)
    logits(teacher, blocks)
    saliency.close()
    ((hidden, indices, weights),) = seen
    norms, counts, num_unused = torch.zeros(8, dtype=torch.float64), torch.zeros(8), 0
    for row, chosen, shares in zip(hidden, indices, weights, strict=True):
        used = [(int(e), float(w)) for e, w in zip(chosen, shares, strict=True) if e < 8 and w > 0]
        num_unused += len(chosen) - len(used)
        for expert, weight in used:
            gate, up = (layer.experts.gate_up_proj[expert] @ row).chunk(2)
            output = layer.experts.down_proj[expert] @ (F.silu(gate) * up)
            norms[expert] += weight / sum(w for _, w in used) * float(output.norm())
            counts[expert] += 1
    assert counts[5] == 0 and saliency.reap[5] == 0
    assert (num_unused > 0) == teacher.config.has_dynamic_experts
    torch.testing.assert_close(saliency.reap, norms / counts.clamp(min=1), rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(saliency.frequency, counts.double() / len(hidden))


def test_the_best_are_kept_in_order_and_groups_lose_equally():
    scores = torch.tensor([1.0, 5.0, 3.0, 3.0, 9.0, 8.0, 7.0, 6.0])
    assert keep_best(scores, 3).tolist() == [4, 5, 6]
    assert keep_best(scores, 4, 2).tolist() == [1, 2, 4, 5]
    assert keep_best(torch.ones(5), 3).tolist() == [0, 1, 2]


def test_the_share_goes_on_and_its_steering_starts_again(blocks):
    teacher = teacher_of()
    for layer in find_moe_layers(teacher):
        layer.router.share.state.copy_(torch.tensor([2.5, 0.3, 0.01]))
    states = {
        number: next(layer.router.share.state.tolist() for layer in find_moe_layers(cut(teacher, blocks, **settings)))
        for number, settings in enumerate([{}, {"n_routed_experts": 4}, {"num_experts_per_tok": 2}])
    }
    assert states[0] == pytest.approx([2.5, 0.3, 0.01])
    assert states[1] == [2.5, 0.0, 1.0]
    assert states[2][0] != 2.5 and states[2][1:] == [0.0, 1.0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden_size": 33}, "hidden_size: got 33, expected at most the teacher's 32"),
        ({"q_lora_rank": 8}, "q_lora_rank: got 8, expected a number like the teacher's None; a norm lies between"),
        ({"v_head_dim": 16}, "v_head_dim: got 16, expected the teacher's 32"),
        ({"norm_type": "layernorm"}, "norm_type: got layernorm, expected the teacher's rmsnorm"),
        ({"vocab_size": 60}, "vocab_size: got 60, expected the teacher's 64"),
        ({"first_k_dense_replace": 0}, "num_hidden_layers: got 3 expert layers, expected at most the teacher's 2"),
        ({"n_routed_experts": 9, "num_experts_per_tok": 4}, "n_routed_experts: got 9, expected at most"),
    ],
)
def test_obstacles_are_named_without_a_weight(settings, message):
    teacher = DeepseekConfig.from_preset(
        "debug", vocab_size=64, hidden_size=32, min_experts_per_tok=None, target_experts_per_tok=None
    )
    found = obstacles_to_shrink(teacher, student_config(teacher, settings))
    assert any(text.startswith(message) for text in found), found
    with pytest.raises(ValueError, match="not a slice of the teacher"):
        shrink(DeepseekForCausalLM(teacher), student_config(teacher, settings), None)


def test_an_unknown_setting_is_named():
    with pytest.raises(ValueError, match="n_routed_expert: no such setting of deepseek_moe; did you mean n_routed_e"):
        student_config(DeepseekConfig.from_preset("debug"), {"n_routed_expert": 4})
