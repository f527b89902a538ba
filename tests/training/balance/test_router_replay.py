"""The experts of a rollout are those of every pass that learns from it; off, nothing is touched."""

import pytest
import torch
from datasets import Dataset
from ppo_parts import make_tokenizer
from tiny_families import build_generating, build_tiny, find_experts_classes, logits_of, token_ids
from tiny_models import TINY
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from deepseek_records.activation_checkpointing import enable_checkpointing
from deepseek_training.balance.replay_callback import RouterReplayCallback
from deepseek_training.balance.router_replay import RouterReplay
from modeling_deepseek import DeepseekConfig, DeepseekForCausalLM
from modeling_deepseek.families import find_moe_layers
from modeling_deepseek.router_output import read_choice

CLASSES = dict(map(reversed, find_experts_classes()))
# The first chooses without `topk`, the second has two kinds of tokens, the third is given no token ids.
REFUSED = {"PhimoeExperts", "Ernie4_5_VLMoeMoeExperts", "Qwen3OmniMoeTalkerTextExperts"}
PROMPT, NEW = 9, 12


def stock_v3(**settings):
    torch.manual_seed(0)
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**{**TINY, **settings}))
    for layer in model.model.layers[1:]:
        torch.nn.init.normal_(layer.mlp.gate.weight, std=0.2)
    return model.eval()


def ours(implementation):
    """With a dynamic number of experts."""
    torch.manual_seed(0)
    config = DeepseekConfig.from_preset("debug", vocab_size=97)
    model = DeepseekForCausalLM(config).eval()
    model.set_experts_implementation(implementation)
    return model


def play(model, seed=0):
    """Generates behind prompts padded on the left; returns tokens and mask."""
    generator = torch.Generator().manual_seed(seed)
    ids, mask = torch.randint(3, 97, (4, PROMPT), generator=generator), torch.ones(4, PROMPT, dtype=torch.long)
    mask[0, :4] = mask[1, :2] = 0
    ids = ids.masked_fill(mask == 0, 0)
    torch.manual_seed(seed)
    ids = model.generate(
        ids, attention_mask=mask, max_new_tokens=NEW, do_sample=True, top_k=0, eos_token_id=None, pad_token_id=0
    )
    return ids, torch.cat([mask, torch.ones(4, NEW, dtype=torch.long)], 1)


def learn(model, ids, mask, **inputs):
    """Gradients by name, and the routers' outputs in order of layers, of one pass."""
    seen, layers = {}, find_moe_layers(model)
    handles = [
        layer.router.register_forward_hook(lambda _, __, output, n=n: seen.update({n: seen.get(n, output)}))
        for n, layer in enumerate(layers)
    ]
    model.train()
    model.zero_grad()
    logits = model(ids, attention_mask=mask, use_cache=False, **inputs).logits[:, :-1]
    logprobs = logits.float().log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    (logprobs * (mask if mask is not None else torch.ones_like(ids))[:, 1:]).sum().backward()
    for handle in handles:
        handle.remove()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return gradients, [tuple(part.detach() for part in seen[n]) for n in range(len(layers))], logprobs.detach()


@torch.no_grad()
def disturb(model):
    """Change the routers so that they would choose otherwise."""
    torch.manual_seed(5)
    for layer in find_moe_layers(model):
        for parameter in layer.router.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.5)


def chosen(output, num_experts):
    """[T, E] bool."""
    _, weights, indices = output
    used = (weights != 0) & (indices < num_experts)
    table = torch.zeros(len(indices), num_experts, dtype=torch.long)
    return table.scatter_add_(1, indices.clamp(max=num_experts - 1), used.long()) > 0


@pytest.mark.parametrize("build", [stock_v3, lambda: ours("eager"), lambda: ours("fused_moe")],
                         ids=["stock", "dynamic-eager", "dynamic-fused"])  # fmt: skip
def test_a_changed_router_keeps_the_rollouts_experts_and_its_weights_live(build):
    model = build()
    replay = RouterReplay(model).attach()
    ids, mask = play(model)
    _, before, _ = learn(model, ids, mask)
    disturb(model)
    _, after, _ = learn(model, ids, mask)
    replay.detach()
    _, live, _ = learn(model, ids, mask)
    kept = torch.cat([mask[:, :-1], torch.zeros(4, 1)], 1).bool().flatten()  # nobody read the last sampled token
    for old, new, other in zip(before, after, live, strict=True):
        tables = [chosen(output, 8)[kept] for output in (old, new, other)]
        assert torch.equal(tables[0], tables[1]) and not torch.equal(tables[0], tables[2])
        assert not torch.equal(old[1], new[1])


def test_the_share_counts_what_was_replayed():
    model = stock_v3()
    replay = RouterReplay(model).attach()
    ids, mask = play(model)
    assert replay.take_share() is None
    learn(model, ids, mask)
    num_tokens = int(mask.sum())
    assert replay.take_share() == pytest.approx((num_tokens - 4) / num_tokens)
    learn(model, ids.flip(1), mask.flip(1))  # text that nobody generated
    assert replay.take_share() == 0
    replay.clear()
    learn(model, ids, mask)
    assert replay.take_share() is None


def test_the_gradient_is_that_of_fixed_sets():
    model = stock_v3()
    replay = RouterReplay(model).attach()
    ids, mask = play(model)
    disturb(model)
    replayed, outputs, _ = learn(model, ids, mask)
    replay.detach()
    layers = find_moe_layers(model)

    def fixed(router, args, output, indices):
        scores = output[0].sigmoid().gather(1, indices)
        return output[0], scores / (scores.sum(-1, keepdim=True) + 1e-20) * router.routed_scaling_factor, indices

    for layer, (_, _, indices) in zip(layers, outputs, strict=True):
        layer.router.register_forward_hook(lambda *call, i=indices: fixed(*call, i))
    expected, _, _ = learn(model, ids, mask)
    assert replayed.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(replayed[name], expected[name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("is_reentrant", [False, True])
def test_recomputation_changes_no_gradient(is_reentrant):
    model = ours("fused_moe")
    replay = RouterReplay(model).attach()
    ids, mask = play(model)
    disturb(model)
    plain, _, _ = learn(model, ids, mask)
    enable_checkpointing(model, {"use_reentrant": is_reentrant})
    model.enable_input_require_grads()
    recomputed, _, _ = learn(model, ids, mask)
    assert all(torch.equal(recomputed[name], plain[name]) for name in plain)
    assert not any(replay._pending)


def test_rows_may_be_packed_cut_and_in_another_order():
    model = stock_v3()
    replay = RouterReplay(model).attach()
    ids, mask = play(model)
    disturb(model)
    _, _, padded = learn(model, ids, mask)
    rows = [ids[row][mask[row].bool()][:-3] for row in (2, 0, 3)]
    packed = torch.cat(rows).unsqueeze(0)
    positions = torch.cat([torch.arange(len(row)) for row in rows]).unsqueeze(0)
    replay.take_share()
    _, _, logprobs = learn(model, packed, None, position_ids=positions)
    assert replay.take_share() == 1
    start = 0
    for row, number in zip(rows, (2, 0, 3), strict=True):
        first = ids.shape[1] - len(row) - 3
        wanted = padded[number, first : first + len(row) - 1]
        torch.testing.assert_close(logprobs[0, start : start + len(row) - 1], wanted, atol=1e-5, rtol=1e-5)
        start += len(row)


def test_without_records_and_after_detaching_every_bit_is_as_before():
    model = ours("fused_moe")
    ids, mask = torch.randint(3, 97, (2, 10)), torch.ones(2, 10, dtype=torch.long)
    plain, _, logprobs = learn(model, ids, mask)
    replay = RouterReplay(model).attach()
    hooked, _, others = learn(model, ids, mask)
    replay.detach()
    assert torch.equal(logprobs, others) and all(torch.equal(plain[name], hooked[name]) for name in plain)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_new_rollout_takes_the_place_of_one_that_was_learned_from():
    model = stock_v3()
    replay = RouterReplay(model).attach()
    first, mask = play(model)
    learn(model, first, mask)
    play(model.eval(), seed=1)
    replay.take_share()
    learn(model, first, mask)
    assert replay.take_share() == 0


def test_experts_from_elsewhere():
    model = stock_v3()
    replay = RouterReplay(model).attach()
    ids = list(range(5, 13))
    experts = torch.rand(7, 2, 8, generator=torch.Generator().manual_seed(0)).argsort(-1)[..., :3]
    replay.add(ids, experts)
    _, outputs, _ = learn(model, torch.tensor([ids]), torch.ones(1, 8, dtype=torch.long))
    for layer, (_, _, indices) in enumerate(outputs):
        assert torch.equal(indices[:7], experts[:, layer])
    expected = r"^router_replay: got experts of shape \(5, 2, 3\), expected \[8 or 7, 2, K\] for 8 tokens and 2 MoE"
    with pytest.raises(ValueError, match=expected):
        replay.add(ids, experts[:5])
    with pytest.raises(ValueError, match="got experts of shape"):
        replay.add(ids, experts[:, :1])
    with pytest.raises(ValueError, match=r"^router_replay: got 2 experts per token, expected 3 as noted before"):
        replay.add(ids, experts[..., :2])
    with pytest.raises(ValueError, match=r"^router_replay: got experts of torch.float32, expected a tensor of whole"):
        replay.add(ids, experts.float())
    replay.clear()
    replay.add(ids, experts[..., :2])
    with pytest.raises(ValueError, match=r"^router_replay: got 2 experts per token, expected 3 as DeepseekV3"):
        learn(model, torch.tensor([ids]), torch.ones(1, 8, dtype=torch.long))


def test_what_cannot_be_replayed_is_refused_in_one_line():
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=97)
    with pytest.raises(ValueError, match=r"^router_replay: got LlamaForCausalLM without routed experts"):
        RouterReplay(LlamaForCausalLM(LlamaConfig(**sizes)))
    model = build_tiny(CLASSES["MiniMaxExperts"], "MiniMaxExperts")
    RouterReplay(model).attach()
    with pytest.raises(ValueError, match=r"^router_replay: got a generation of MiniMaxModel without its first step"):
        model.generate(token_ids(), max_new_tokens=3, min_new_tokens=3, pad_token_id=0)
    model = build_tiny(CLASSES["PhimoeExperts"], "PhimoeExperts")
    RouterReplay(model).attach()
    ids = model.generate(token_ids(), max_new_tokens=3, min_new_tokens=3, pad_token_id=0)
    with pytest.raises(ValueError, match=r"^router_replay: got PhimoeTopKRouter with 0 calls of topk"):
        model.train()(ids, use_cache=False)


def test_a_decoder_that_is_given_embeddings_has_the_tokens_of_the_model_around_it():
    """Images are no tokens: what was generated behind one is routed live, and so is a pass over one."""
    model = build_generating(CLASSES["Qwen3VLMoeTextExperts"], "Qwen3VLMoeTextExperts")
    config, vision = model.config, model.config.vision_config
    config.image_token_id, config.vision_start_token_id = 95, 94
    grid = torch.tensor([[1, 4, 4]])
    patches = torch.randn(16, 3 * vision.temporal_patch_size * vision.patch_size**2)
    seen = [5, 94] + [95] * (16 // vision.spatial_merge_size**2) + [6, 7]
    types = torch.tensor([[int(token == 95) for token in seen]])
    image = {"pixel_values": patches, "image_grid_thw": grid, "mm_token_type_ids": types}
    replay = RouterReplay(model).attach()
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": True, "pad_token_id": 0}
    words = model.generate(torch.tensor([[5, 6, 7, 8]]), **settings)
    model.generate(torch.tensor([seen]), **image, **settings)
    for inputs, expected in (({"input_ids": words}, 7 / 8), ({"input_ids": torch.tensor([seen]), **image}, None)):
        model(**inputs, use_cache=False)
        assert replay.take_share() == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CLASSES if name not in REFUSED])
def test_every_family(name):
    model, ids = build_tiny(CLASSES[name], name), token_ids()
    layers = find_moe_layers(model)

    def look():
        seen = {}
        handles = [
            layer.router.register_forward_hook(lambda _, __, output, n=n: seen.__setitem__(n, output))
            for n, layer in enumerate(layers)
        ]
        logits_of(model.train(), ids).square().mean().backward()
        for handle in handles:
            handle.remove()
        return [read_choice(seen[n], layer.logits_place).topk_indices for n, layer in enumerate(layers)]

    before = look()
    width = max(indices.shape[1] for indices in before)
    disturb(model)
    replay = RouterReplay(model).attach()
    experts = torch.stack([indices.view(*ids.shape, width) for indices in before], 2)
    for row, noted in zip(ids.tolist(), experts, strict=True):
        replay.add(row, noted)
    model.zero_grad()
    after = look()
    assert replay.take_share() == 1
    assert all(torch.equal(old.sort(-1).values, new.sort(-1).values) for old, new in zip(before, after, strict=True))
    replay.detach()
    assert any(not torch.equal(old, new) for old, new in zip(before, look(), strict=True))


@pytest.mark.parametrize("algorithm", ["grpo", pytest.param("rloo", marks=pytest.mark.slow)])
def test_in_trls_trainers(algorithm, tmp_path):
    import trl

    tokenizer = make_tokenizer()
    config, trainer_class = {
        "grpo": (trl.GRPOConfig, trl.GRPOTrainer),
        "rloo": (trl.RLOOConfig, trl.RLOOTrainer),
    }[algorithm]
    torch.manual_seed(0)
    model = DeepseekForCausalLM(DeepseekConfig.from_preset("debug", vocab_size=len(tokenizer)))
    args = config(
        str(tmp_path), max_steps=2, per_device_train_batch_size=4, num_generations=2, max_completion_length=6,
        num_iterations=2, beta=0.0, bf16=False, use_cpu=True, report_to=[], logging_steps=1, save_strategy="no",
        gradient_checkpointing=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = trainer_class(
        model=model, args=args, processing_class=tokenizer,
        reward_funcs=lambda completions, **kwargs: [float(len(text)) for text in completions],
        train_dataset=Dataset.from_dict({"prompt": ["a b", "c d", "b c", "d a"]}),
    )  # fmt: skip
    callback = RouterReplayCallback.attach(trainer)
    trainer.train()
    shares = [row["router_replay_share"] for row in trainer.state.log_history if "loss" in row]
    assert len(shares) == 2 and all(0.5 < share < 1 for share in shares)  # all but each row's last token
    assert callback.replay is None
