"""What is done with a MoE family beyond training it: 4 bits, replay of a rollout's experts, fewer experts.

Columns of `moe_families.py`, each a function that returns ``yes`` or raises.
"""

import copy
import tempfile
from collections.abc import Callable

import torch
from tiny_families import NUM_EXPERTS, build_generating, logits_of, loss_of, token_ids
from torch import nn
from transformers import PreTrainedModel

from deepseek_training.balance.router_replay import RouterReplay
from deepseek_training.compress.stock_experts import shrink_experts
from modeling_deepseek import quantize_experts
from modeling_deepseek.families import MoeLayer, find_moe_layers
from modeling_deepseek.four_bit_experts import dequantize_experts

YES = "yes"
PROMPT, NEW = 6, 6
# What generating or rebuilding a tiny model raises in transformers.
FAILURES = (ValueError, TypeError, AttributeError, RuntimeError, KeyError, IndexError)


class RefusedError(Exception):
    """A column does not hold for a family, with the reason in one line."""


def layers_of(model: nn.Module) -> list[MoeLayer]:
    """Return the layers with experts.

    Args:
        model: From `build_tiny`, wrapped or not.

    Raises:
        RefusedError: There are none, or a router stands beside no experts.
    """
    layers = find_moe_layers(model)
    if not layers:
        raise RefusedError("no router stands beside its experts")
    if any(layer.experts is None for layer in layers):
        raise RefusedError("the router's block has no experts module")
    return layers


def runs_in_four_bits(build: Callable[[], PreTrainedModel]) -> str:
    """Experts in 4 bits compute what their matrices, read back, compute in transformers' own loop, with gradients."""
    packed = build()
    packed.set_experts_implementation("eager")
    try:
        quantize_experts(packed, format="nf4", group_size=8)
    except ValueError as error:
        raise RefusedError(str(error)) from None
    dense = dequantize_experts(copy.deepcopy(packed), torch.float32)
    found = []
    for model in (packed, dense):
        loss_of(model, token_ids()).backward()
        with torch.no_grad():
            found.append((logits_of(model, token_ids()), model.get_input_embeddings().weight.grad))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
    return YES


def replays_a_rollout(build: Callable[[], PreTrainedModel]) -> str:
    """Routers that were changed after a rollout give the experts of the rollout, and without replay others."""
    model = build()
    layers = layers_of(model)
    if not model.can_generate():
        try:
            model = build_generating(type(model).__module__, type(layers[0].experts).__name__)
        except ValueError as error:
            reason = "no class around it generates" if "()" in str(error) else "no tiny model around it could be built"
            raise RefusedError(f"{type(model).__name__} does not generate text token by token; {reason}") from None
        layers = layers_of(model)
    try:
        replay = RouterReplay(model).attach()
    except ValueError as error:
        raise RefusedError(str(error)) from None
    settings = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": True, "eos_token_id": None}
    torch.manual_seed(0)
    try:
        ids = model.generate(token_ids(length=PROMPT), pad_token_id=0, use_cache=True, **settings)
        rollout = _chosen(model, layers, ids)
        share = replay.take_share()
        with torch.no_grad():
            for parameter in (one for layer in layers for one in layer.router.parameters()):
                parameter.add_(torch.randn_like(parameter) * 0.5)
        replayed = _chosen(model, layers, ids)
        replay.detach()
        live = _chosen(model, layers, ids)
    except FAILURES as error:
        raise RefusedError(f"{type(error).__name__}: {error}") from None
    if not share:
        raise RefusedError("nothing of the rollout was noted: router_replay_share is 0")
    is_read = torch.ones(ids.shape, dtype=torch.bool)
    is_read[:, -1] = False  # nobody read the last sampled token
    if torch.equal(rollout[:, is_read.flatten()], live[:, is_read.flatten()]):
        raise RefusedError("other routers choose the same experts, so nothing is shown")
    if not torch.equal(rollout[:, is_read.flatten()], replayed[:, is_read.flatten()]):
        raise RefusedError("the changed routers choose other experts than the rollout's")
    return YES


def _chosen(model: PreTrainedModel, layers: list[MoeLayer], ids: torch.Tensor) -> torch.Tensor:
    """[layers, tokens, experts], bool: what each experts module is given in a training pass."""
    seen: dict[int, torch.Tensor] = {}

    def note(number: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            tensors = [tensor for tensor in (*args, *kwargs.values()) if isinstance(tensor, torch.Tensor)]
            (indices,) = [tensor for tensor in tensors if not tensor.is_floating_point()]
            table = torch.zeros(indices.shape[0], NUM_EXPERTS + 1, dtype=torch.bool)
            seen[number] = table.scatter_(1, indices.clamp(max=NUM_EXPERTS), True)[:, :NUM_EXPERTS]

        return hook

    handles = [
        layer.experts.register_forward_pre_hook(note(number), with_kwargs=True) for number, layer in enumerate(layers)
    ]
    model.train()
    model(input_ids=ids, use_cache=False)
    model.eval()
    for handle in handles:
        handle.remove()
    return torch.stack([table for _, table in sorted(seen.items())])  # Ernie's experts of images saw nothing


def loses_experts(build: Callable[[], PreTrainedModel]) -> str:
    """`shrink` halves the experts, and what it saves is loaded with the same logits."""
    model = build()
    layers_of(model)
    config = copy.deepcopy(model.config)
    text = config.get_text_config()
    counts = [name for name, value in vars(text).items() if value == NUM_EXPERTS and "expert" in name]
    if not counts:
        raise RefusedError("no setting holds the number of experts")
    for name in counts:
        setattr(text, name, NUM_EXPERTS // 2)
    try:
        student, _ = shrink_experts(model, config, token_ids())
    except FAILURES as error:
        raise RefusedError(str(error)) from None
    with tempfile.TemporaryDirectory() as folder:
        student.save_pretrained(folder)
        loaded = type(model).from_pretrained(folder).eval()
    with torch.no_grad():
        torch.testing.assert_close(logits_of(loaded, token_ids()), logits_of(student, token_ids()))
    return YES
