"""How much of what two experts implementations differ by, in bf16, comes from other experts being chosen.

    OMP_NUM_THREADS=1 python dev/routing_flips.py

Small models of the kinds that ``finetune_count.py`` names, all layers, drawn weights, on a CPU: the logits of the
last 64 of 256 tokens by ``fused_moe`` against those by transformers' ``grouped_mm``, in bf16 and in fp32; against
one another with the experts that ``grouped_mm`` chose in bf16; and of each against the same model in fp32. Rounding
changes the router's input by some thousandths. Where two experts' scores are nearer than that another one is chosen,
and where a model gives its experts large weights the token goes on from there as another one.
"""

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from deepseek_cli.benchmarks import drawn_models
from deepseek_cli.benchmarks.finetune_count import released_models
from deepseek_training.balance.router_replay import RouterReplay
from modeling_deepseek.families import find_moe_layers

HIDDEN, TOKENS, LAST = 256, 256, 64
FUSED, STOCK = "fused_moe", "grouped_mm"
SIZES = {"hidden_size": HIDDEN, "vocab_size": 2048, "intermediate_size": 1408, "num_key_value_heads": 2}
# As the standard deviation shrinks products with the hidden size, so that attention and experts weigh what they weigh
# in the released model.
STD = 0.02 * (2048 / HIDDEN) ** 0.5


def small(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the same model an eighth as wide.

    Args:
        config: Of a released model.
    """
    own = {"moe_intermediate_size": config.moe_intermediate_size // 8}
    heads = 2 if "kv_lora_rank" in vars(config) else 4
    return drawn_models.changed(config, num_attention_heads=heads, **SIZES, **own)


class Choices:
    """Runs a model by an implementation and keeps the experts that every layer chose.

    Args:
        model: Of `drawn_models.build`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self.layers = model, find_moe_layers(model)
        self.ids = torch.randint(0, SIZES["vocab_size"], (1, TOKENS), generator=torch.Generator().manual_seed(0))

    def run(self, implementation: str) -> tuple[Tensor, Tensor]:
        """Return the last logits [64, V] and the experts [T, L, K], in order.

        Args:
            implementation: Of the experts.
        """
        chosen: list[Tensor] = []

        def keep(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            chosen.append(arguments[1])

        drawn_models.set_implementation(self.model, implementation)
        hooks = [layer.experts.register_forward_pre_hook(keep) for layer in self.layers]
        with torch.no_grad():
            logits = self.model(input_ids=self.ids, use_cache=False).logits[0, -LAST:].float()
        for hook in hooks:
            hook.remove()
        return logits, torch.stack(chosen, 1).sort(-1).values

    def run_with(self, experts: Tensor, implementation: str) -> Tensor:
        """Return the last logits where every token keeps the given experts.

        Args:
            experts: [T, L, K].
            implementation: Of the experts.
        """
        replay = RouterReplay(self.model).attach()
        replay.add(self.ids[0].tolist(), experts)
        logits, used = self.run(implementation)
        replay.detach()
        if not torch.equal(used, experts):
            raise RuntimeError("the experts were not replayed")
        return logits


def difference(got: Tensor, wanted: Tensor) -> float:
    """Return the norm of the difference by that of what is wanted.

    Args:
        got: Any shape.
        wanted: The same.
    """
    return ((got - wanted).norm() / wanted.norm()).item()


def main() -> None:
    """Print the table."""
    drawn_models._STD = STD
    titles = ("model", "bf16", "choose otherwise", "same experts", "fp32", "fused_moe off fp32", "grouped_mm off fp32")
    print("| " + " | ".join(titles) + " |")
    print("| " + " | ".join(["---"] * len(titles)) + " |")
    for name, config in released_models().items():
        runs = Choices(drawn_models.build(small(config), "bf16", "cpu"))
        stock, experts = runs.run(STOCK)
        fused, others = runs.run(FUSED)
        replayed = runs.run_with(experts, FUSED)
        runs.model.float()
        wide = {implementation: runs.run(implementation)[0] for implementation in (FUSED, STOCK)}
        flipped = (experts != others).any(-1).float().mean().item()
        pairs = [(replayed, stock), (wide[FUSED], wide[STOCK]), (fused, wide[STOCK]), (stock, wide[STOCK])]
        figures = [difference(fused, stock), flipped, *(difference(*pair) for pair in pairs)]
        cells = [f"{flipped:.0%}" if figure is flipped else f"{figure:.1e}" for figure in figures]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
