import pytest
import torch

from deepseek_records.activation_checkpointing import enable_checkpointing
from deepseek_training.balance.callback import ExpertBalanceCallback
from deepseek_training.balance.routing_observer import RoutingObserver
from modeling_deepseek import DeepseekConfig, DeepseekForCausalLM
from modeling_deepseek.expert_share import ExpertShareController


def config(**settings):
    base = {"n_routed_experts": 16, "num_experts_per_tok": 12, "min_experts_per_tok": 8, "n_group": 1, "topk_group": 1}
    return DeepseekConfig(**{**base, **settings})


def test_keeps_the_smallest_set_that_reaches_p():
    # Shares before each slot: 0, .4, .7, .9; p = .7 is reached by two experts, p just above needs three.
    shares = torch.tensor([[0.4, 0.3, 0.2, 0.1]])
    for p, low, number in ((0.69, 1, 2), (0.71, 1, 3), (0.05, 1, 1), (0.05, 3, 3), (1.0, 1, 4)):
        share = ExpertShareController(config(num_experts_per_tok=4, min_experts_per_tok=low, expert_top_p=p))
        assert share(shares).tolist() == [[True] * number + [False] * (4 - number)]


def simulated_shares(kind, generator):
    logits = torch.randn(4096, 12, generator=generator).sort(descending=True).values
    scores = {"flat": 1 + 0.01 * logits, "sigmoid": logits.sigmoid(), "peaked": (4 * logits).exp()}[kind]
    return scores / scores.sum(-1, keepdim=True)


@pytest.mark.parametrize("kind", ["flat", "sigmoid", "peaked"])
@pytest.mark.parametrize("target", [8.5, 10.0, 11.5])
@pytest.mark.parametrize("start", [None, 0.05, 1.0])
def test_holds_the_target_after_settling(kind, target, start):
    """Flat, ordinary and peaked routers, from good and bad starts: settled within 150 steps, then held to 0.1."""
    share = ExpertShareController(config(target_experts_per_tok=target, expert_top_p=start))
    generator = torch.Generator().manual_seed(0)
    means = []
    for _ in range(200):
        means.append(share(simulated_shares(kind, generator)).sum(-1).float().mean().item())
        share.step(means[-1])
    assert max(abs(mean - target) for mean in means[150:]) < 0.1


def test_does_not_move_without_a_target():
    share = ExpertShareController(config(expert_top_p=0.5))
    before = share.state.clone()
    share.step(8.0)
    assert torch.equal(share.state, before)


def train(model, input_ids, *, steps, accumulation=1, **kwargs):
    """A loop of one's own; the counts of its last step, one per layer."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model.train()
    balance = ExpertBalanceCallback()
    balance.begin(model, accumulation)
    for _ in range(steps):
        balance._window = []
        for part in input_ids.chunk(accumulation):
            (model(part, labels=part, **kwargs).loss / accumulation).backward()
        optimizer.step()
        optimizer.zero_grad()
        balance.finish_step()
    balance.end(model)
    return balance._window


def build(tiny, **settings):
    torch.manual_seed(0)
    dynamic = {"min_experts_per_tok": 1, "expert_top_p": 0.4, "target_experts_per_tok": 1.7}
    return DeepseekForCausalLM(DeepseekConfig(**{**tiny, **dynamic, **settings}))


def states(model):
    return [layer.mlp.gate.share.state.tolist() for layer in model.model.layers[1:]]


def test_a_plain_training_loop_steers(tiny):
    model = build(tiny)
    input_ids = torch.randint(3, 97, (8, 40), generator=torch.Generator().manual_seed(0))
    for counts in train(model, input_ids, steps=60):
        assert counts.tokens_per_expert.sum().item() / counts.num_tokens == pytest.approx(1.7, abs=0.1)


def test_evaluation_and_rollouts_leave_the_state_alone(tiny, input_ids):
    model, balance = build(tiny), ExpertBalanceCallback()
    balance.begin(model)
    before = states(model)
    model.eval()(input_ids).logits.sum().backward()
    model.generate(input_ids, max_new_tokens=3, do_sample=False)
    with torch.no_grad():
        model.train()(input_ids)
    balance.finish_step()
    assert states(model) == before
    model(input_ids)
    balance.finish_step()
    assert states(model) != before


@pytest.mark.parametrize("reentrant", [None, True, False])
@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_state_does_not_depend_on_how_a_step_is_computed(tiny, reentrant, accumulation):
    """Witness: one whole batch without checkpointing."""
    input_ids = torch.randint(3, 97, (4, 21), generator=torch.Generator().manual_seed(0))
    plain, other = build(tiny), build(tiny)
    if reentrant is not None:
        enable_checkpointing(other, {"use_reentrant": reentrant})
    wanted = train(plain, input_ids, steps=3)
    found = train(other, input_ids, steps=3, accumulation=accumulation)
    torch.testing.assert_close(torch.tensor(states(other)), torch.tensor(states(plain)), rtol=1e-5, atol=1e-6)
    for one, two in zip(wanted, found, strict=True):
        assert torch.equal(one.tokens_per_expert, two.tokens_per_expert)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_not_counted(tiny, side):
    real = torch.randint(3, 97, (2, 11), generator=torch.Generator().manual_seed(0))
    padding = torch.zeros(2, 6, dtype=torch.long)
    pieces, masks = [padding, real], [torch.zeros(2, 6).long(), torch.ones(2, 11).long()]
    if side == "right":
        pieces.reverse(), masks.reverse()
    found = []
    for inputs in ({"input_ids": real}, {"input_ids": torch.cat(pieces, 1), "attention_mask": torch.cat(masks, 1)}):
        model = build(tiny).train()
        observer = RoutingObserver(model).attach()
        model(**inputs)
        found.append(observer.take(over_ranks=False))
    for bare, padded in zip(*found, strict=True):
        assert padded.num_tokens == 22
        assert torch.equal(bare.tokens_per_expert, padded.tokens_per_expert)


def test_state_is_saved_and_resumed(tiny, input_ids, tmp_path):
    model = build(tiny)
    train(model, input_ids, steps=3)
    model.save_pretrained(tmp_path)
    loaded = DeepseekForCausalLM.from_pretrained(tmp_path)
    assert states(loaded) == states(model) != states(build(tiny))
    half = DeepseekForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert states(half) == states(model), "bf16 must not round the controller"
