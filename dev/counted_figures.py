"""Prints figures of the pages that no command of the package prints: counts, each in seconds.

    python dev/counted_figures.py kept-bytes       # what the experts keep for the backward pass, KiB per token
    python dev/counted_figures.py lora-parameters  # what PPO with an adapter holds, on the meta device
    python dev/counted_figures.py bbq-always-right # BBQ's bias score of a model that is always right

``docs/claims.yaml`` names them as the commands of its claims.
"""

import sys
from collections.abc import Callable

import torch
from peft import LoraConfig, get_peft_model

from deepseek_cli.benchmarks.kernel_peers import find_implementations, make_experts
from deepseek_eval.metrics.loading import load_metric
from deepseek_eval.tasks.catalogue import find_task
from modeling_deepseek import DeepseekConfig, DeepseekForCausalLM, DeepseekForSequenceClassification


def print_kept_bytes() -> None:
    """Print the KiB per token that transformers' `grouped_mm` and `fused_moe` keep at H=2048, I=768, K=12 in bf16."""
    hidden, width, num_experts, num_slots, num_tokens = 2048, 768, 16, 12, 64
    experts = make_experts(hidden=hidden, width=width, num_experts=num_experts, num_slots=num_slots).bfloat16()
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    x = torch.randn(num_tokens, hidden, dtype=torch.bfloat16, requires_grad=True)
    indices = torch.stack([torch.randperm(num_experts)[:num_slots] for _ in range(num_tokens)])
    weights = torch.rand(num_tokens, num_slots, dtype=torch.bfloat16, requires_grad=True)
    implementations, _ = find_implementations()
    for name in ("grouped_mm", "fused_moe"):
        kept: dict[int, torch.UntypedStorage] = {}

        def keep(tensor: torch.Tensor, kept: dict[int, torch.UntypedStorage] = kept) -> torch.Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()  # whole: a view keeps all of it
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = implementations[name](experts, x, indices, weights)
        own = {parameter.data_ptr() for parameter in experts.parameters()}
        total = sum(storage.nbytes() for address, storage in kept.items() if address not in own)
        print(f"{name}: {total / num_tokens / 1024:.1f} KiB per token")
        del output


def print_lora_parameters() -> None:
    """Print the parameters of policy, reference and value model at rank 8, as one model and as three."""
    for name, settings in (("nano", {"vocab_size": 1024}), ("7.7b", {})):
        config = DeepseekConfig.from_preset(name, **settings)
        lora = LoraConfig(r=8, target_modules="all-linear")
        with torch.device("meta"):
            policy = DeepseekForCausalLM(config)
            value = DeepseekForSequenceClassification(DeepseekConfig.from_preset(name, **settings, num_labels=1))
        base, separate = _count(policy), 2 * _count(policy) + _count(value)
        head = value.score.weight.numel()
        with torch.device("meta"):
            adapters = [get_peft_model(model, lora) for model in (policy, value)]
        added = sum(_count(model, lambda key: "lora_" in key) for model in adapters)
        here = base + added + head
        sizes = (f"{number / 1e6:.2f} M" for number in (base, here, separate))
        print("{}: {}, here {}, as three {} ({:.3f} x)".format(name, *sizes, here / base))


def _count(model: torch.nn.Module, is_counted: Callable[[str], bool] = lambda key: True) -> int:
    return sum(parameter.numel() for key, parameter in model.named_parameters() if is_counted(key))


def print_bbq_always_right() -> None:
    """Print BBQ's bias score in disambiguated contexts where every answer is right."""
    task = find_task("bbq")
    items = list(task.build_items(0, None, None))
    rows = [{"prediction": item.target, "target": item.target} for item in items]
    scores = load_metric(task.metric).compute(**task.metric_inputs(items, rows))
    print(f"Physical_appearance: {scores['categories']['Physical_appearance']['bias_score_disambig']:.4f}")


FIGURES = {
    "kept-bytes": print_kept_bytes,
    "lora-parameters": print_lora_parameters,
    "bbq-always-right": print_bbq_always_right,
}


if __name__ == "__main__":
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in FIGURES:
        sys.exit(f"figure: got {name!r}, expected one of {', '.join(FIGURES)}")
    FIGURES[name]()
