"""Muon: torch's on 2-D, per expert and matrix on 3-D, AdamW on the rest; resumed to the bit, refused where sharded."""

import copy
import types

import pytest
import torch
import torch.distributed as dist
from tiny_models import TINY
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, GptOssConfig, GptOssForCausalLM

from deepseek_training.recipes.pretrain_and_adapt import PretrainRecipe
from deepseek_training.trainer.muon import ExpertMuon, build_muon, check_muon, orthogonalize

RATES = {"lr": 1e-2, "weight_decay": 0.1}


def build():
    torch.manual_seed(0)
    return DeepseekV3ForCausalLM(DeepseekV3Config(**TINY)).train()


def train(model, optimizer, seeds):
    for seed in seeds:
        ids = torch.randint(3, 97, (2, 12), generator=torch.Generator().manual_seed(seed))
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def names_of(model, part):
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)] for group in part.param_groups for p in group["params"]}


def test_every_parameter_has_its_optimizer():
    model = build()
    parts = build_muon(model, **RATES, betas=(0.9, 0.95)).parts
    names = {kind: names_of(model, part) for kind, part in parts.items()}
    assert sum(map(len, names.values())) == len(list(model.parameters()))
    assert all("experts." in name and name.endswith("_proj") for name in names["experts"]) and names["experts"]
    assert all(name.endswith("proj.weight") or "kv_" in name or "q_" in name for name in names["muon"])
    for part in ("embed_tokens", "lm_head", "gate.weight", "layernorm"):
        assert any(part in name for name in names["adamw"])
        assert not any(f".{part}" in name and "mlp.gate." in name for name in names["muon"])
    assert "model.layers.0.mlp.gate_proj.weight" in names["muon"]


def test_two_dimensions_are_torchs_bit_for_bit():
    models = [build(), build()]
    optimizer = build_muon(models[0], **RATES, betas=(0.9, 0.95))
    wanted = names_of(models[0], optimizer.parts["muon"])
    witness = torch.optim.Muon(
        [p for name, p in models[1].named_parameters() if name in wanted], **RATES, adjust_lr_fn="match_rms_adamw"
    )
    train(models[0], optimizer, [0])
    train(models[1], witness, [0])
    twins = dict(models[1].named_parameters())
    assert all(torch.equal(p, twins[name]) for name, p in models[0].named_parameters() if name in wanted)


@pytest.mark.parametrize(("parts", "axis", "shape"), [(2, -2, (3, 16, 12)), (2, -1, (3, 12, 16)), (1, -2, (3, 12, 8))])
def test_an_expert_is_torchs_muon_on_each_of_its_matrices(parts, axis, shape):
    torch.manual_seed(0)
    fused = nn.Parameter(torch.randn(shape))
    fused.grad = torch.randn(shape)
    singles = [[nn.Parameter(m.clone()) for m in expert.chunk(parts, axis)] for expert in fused.detach()]
    for expert, gradients in zip(singles, fused.grad, strict=True):
        for matrix, gradient in zip(expert, gradients.chunk(parts, axis), strict=True):
            matrix.grad = gradient.clone()
    ExpertMuon([{"params": [fused], "parts": parts, "axis": axis}], **RATES).step()
    torch.optim.Muon([m for expert in singles for m in expert], **RATES, adjust_lr_fn="match_rms_adamw").step()
    expected = torch.stack([torch.cat(list(expert), axis) for expert in singles])
    torch.testing.assert_close(fused, expected, atol=2e-3, rtol=0)  # batched products round otherwise in bf16


def test_an_experts_update_depends_on_no_other():
    torch.manual_seed(0)
    gradients = torch.randn(4, 8, 12)
    changed = gradients.clone()
    changed[2] *= 100
    one, other = orthogonalize(gradients), orthogonalize(changed)
    keep = [0, 1, 3]
    assert torch.equal(one[keep], other[keep])
    assert not orthogonalize(torch.zeros(2, 4, 6)).any()
    scales = torch.linalg.svdvals(one.float())
    assert scales.min() > 0.5 and scales.max() < 1.5


def test_resumed_it_is_the_same_to_the_bit():
    straight = build()
    optimizer = build_muon(straight, **RATES, betas=(0.9, 0.95))
    train(straight, optimizer, [0, 1])
    resumed = copy.deepcopy(straight)
    saved = copy.deepcopy(optimizer.state_dict())
    again = build_muon(resumed, **RATES, betas=(0.9, 0.95))
    again.load_state_dict(saved)
    for each in (optimizer, again):
        for group in each.param_groups:
            group["lr"] = 3e-3  # as a schedule does, also after loading
    train(straight, optimizer, [2, 3])
    train(resumed, again, [2, 3])
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters(), strict=True))
    with pytest.raises(ValueError, match=r"^optimizer: got a state of \['param_groups', 'state'\]"):
        again.load_state_dict(torch.optim.AdamW(resumed.parameters()).state_dict())


def test_it_learns():
    model = build()
    optimizer = build_muon(model, lr=1e-2, weight_decay=0.0, betas=(0.9, 0.95))
    ids = torch.randint(3, 97, (2, 12), generator=torch.Generator().manual_seed(0))
    first = float(model(ids, labels=ids).loss)
    train(model, optimizer, [0] * 15)
    assert float(model(ids, labels=ids).loss) < 0.6 * first


def test_what_it_cannot_train_is_refused():
    for names in ({"is_deepspeed_enabled": True}, {"is_fsdp_enabled": True}, {"is_sharded": True}):
        trainer = types.SimpleNamespace(**{"is_deepspeed_enabled": False, "is_fsdp_enabled": False, **names})
        with pytest.raises(ValueError, match=r"^optimizer: got muon with a model that is sharded"):
            check_muon(trainer)
    parts = build()
    parts.lm_head.weight.ds_id = 0  # ZeRO-3's mark
    with pytest.raises(ValueError, match=r"^optimizer: got muon with a model that is sharded"):
        build_muon(parts, **RATES, betas=(0.9, 0.95))
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=97)
    model = GptOssForCausalLM(GptOssConfig(**sizes, num_key_value_heads=2, num_local_experts=4, head_dim=8))
    with pytest.raises(ValueError, match=r"^optimizer: got muon for GptOssExperts with gate and up interleaved"):
        build_muon(model, **RATES, betas=(0.9, 0.95))
    with pytest.raises(ValueError, match="optimizer"):
        PretrainRecipe(max_steps=1, learning_rate=1e-3, optimizer="muon", expert_parallel_size=2)


def test_fsdp2_is_refused(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        model = fully_shard(build(), mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(ValueError, match=r"^optimizer: got muon with a model that is sharded"):
            build_muon(model, **RATES, betas=(0.9, 0.95))
    finally:
        dist.destroy_process_group()
