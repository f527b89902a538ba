"""Draw the README's picture: what balancing does to a collapsed router, and what a training step costs with it.

    python dev/draw_readme_picture.py runs/bench-step

The left panel trains stock transformers' DeepSeek-V3 and ours from the same weights on the same text, as
``tests/training/balance/test_recovery.py`` does, and looks at the experts' load on held-out text as it goes. The right
panel shows what ``deepseek-moe bench step --output runs/bench-step`` measured before. The folder also keeps the left
panel's figures, so that drawing again measures nothing.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import matplotlib
import torch
from torch import nn
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from deepseek_training.balance import ExpertBalanceCallback
from deepseek_training.data.texts import load_texts
from modeling_deepseek import DeepseekConfig, DeepseekForCausalLM

matplotlib.use("Agg")
PICTURE = Path(__file__).resolve().parents[1] / "docs" / "images" / "training.png"
NUM_STEPS = 150
EVERY = 10
NUM_EXPERTS = 8
OURS, STOCK, INK = "#1668a6", "#b0b7bf", "#3c4349"


class WatchLoad(TrainerCallback):
    """Notes the worst layer's load, max / mean over its experts, on held-out rows every few steps."""

    def __init__(self, rows: torch.Tensor) -> None:
        self.rows = rows
        self.history: list[tuple[int, float]] = []

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Look every `EVERY` steps."""
        if state.global_step % EVERY == 0:
            self.look(model, state.global_step)

    @torch.no_grad()
    def look(self, model: Any, step: int) -> None:
        """Count by hooks, in the same way for both models."""
        loads: list[torch.Tensor] = []

        def count(module: nn.Module, inputs: Any, output: Any) -> None:
            loads.append(torch.bincount(output[2].flatten(), minlength=NUM_EXPERTS).float())

        hooks = [layer.mlp.gate.register_forward_hook(count) for layer in model.model.layers[1:]]
        was_training = model.training
        model.eval()(self.rows)
        model.train(was_training)
        for hook in hooks:
            hook.remove()
        self.history.append((step, max((load.max() / load.mean()).item() for load in loads)))


def watch_recovery() -> dict[str, list[tuple[int, float]]]:
    """Train both models from one collapsed router and return their loads by step."""
    text = " ".join(load_texts("books", "train")[:40]).encode()[: 648 * 64]
    rows = torch.tensor(list(text)).view(648, 64) + 3
    base = DeepseekConfig.from_preset(
        "debug",
        vocab_size=259,
        min_experts_per_tok=None,
        target_experts_per_tok=None,
        num_experts_per_tok=3,
        router_bias_update_speed=0.02,
        seq_aux_loss_coef=1e-3,
    )
    shared = {key: value for key, value in base.to_dict().items() if key in DeepseekV3Config().to_dict()}
    torch.manual_seed(0)
    stock = DeepseekV3ForCausalLM(DeepseekV3Config(**{**shared, "model_type": "deepseek_v3"}))
    _collapse(stock)
    ours = DeepseekForCausalLM(base)
    ours.load_state_dict(stock.state_dict())
    histories = {}
    for name, model, callbacks in (("stock", stock, []), ("ours", ours, [ExpertBalanceCallback()])):
        watch = WatchLoad(rows[600:])
        watch.look(model, 0)
        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                folder,
                max_steps=NUM_STEPS,
                per_device_train_batch_size=8,
                learning_rate=1e-3,
                use_cpu=not torch.cuda.is_available(),
                report_to=[],
                disable_tqdm=True,
                save_strategy="no",
            )
            data = [{"input_ids": row, "labels": row} for row in rows[:600]]
            Trainer(model, arguments, train_dataset=data, callbacks=[*callbacks, watch]).train()
        histories[name] = watch.history
    return histories


@torch.no_grad()
def _collapse(model: Any) -> None:
    """Give every token a common direction and let 3 of 8 experts read it."""
    generator = torch.Generator().manual_seed(0)
    direction = nn.functional.normalize(torch.randn(64, generator=generator), dim=0)
    model.model.embed_tokens.weight += 0.3 * direction
    for layer in model.model.layers[1:]:
        layer.mlp.gate.weight[:3] += 0.5 * direction


def draw(loads: dict[str, list[tuple[int, float]]], steps: dict[str, Any], path: Path) -> None:
    """Write the picture.

    Args:
        loads: Load by step, of ``stock`` and ``ours``.
        steps: What the step benchmark measured, by shape.
        path: The PNG.
    """
    from matplotlib import pyplot

    pyplot.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3), layout="constrained")
    for name, color, label in (
        ("stock", STOCK, "transformers alone"),
        ("ours", OURS, "with ExpertBalanceCallback"),
    ):
        xs, ys = zip(*loads[name], strict=True)
        left.plot(xs, ys, color=color, linewidth=2, label=f"{label}: {ys[-1]:.2f} after {xs[-1]} steps")
    left.axhline(1, color=INK, linewidth=0.5, linestyle=":")
    left.set(xlabel="training step", ylim=(0.9, 3.4))
    left.set_title("Busiest expert's load / mean, from a collapsed router", loc="left", fontsize=10)
    left.legend(frameon=False, loc="upper right")
    for row, (shape, figures) in enumerate(reversed(steps.items())):
        for offset, key, color in ((0.2, figures["best_stock"], STOCK), (-0.2, "ours", OURS)):
            milliseconds = 1000 * figures["seconds"][key]
            right.barh(row + offset, milliseconds, height=0.36, color=color)
            right.annotate(f"{milliseconds:.0f} ms", (milliseconds, row + offset), (3, -3), textcoords="offset points")
        right.annotate(shape, (0, row), (-6, -3), textcoords="offset points", ha="right")
    right.set(xlabel="ms", yticks=[])
    right.set_title("Training step: transformers' fastest (gray), ours (blue)", loc="left", fontsize=10)
    right.margins(x=0.2)
    figure.savefig(path, dpi=160)


def main() -> None:
    """Measure the left panel, read the right one, draw both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", type=Path, help="folder that `deepseek-moe bench step` wrote")
    args = parser.parse_args()
    steps = json.loads((args.steps / "results.json").read_text(encoding="utf-8"))
    kept = args.steps / "load_by_step.json"
    if not kept.exists():
        kept.write_text(json.dumps(watch_recovery()), encoding="utf-8")
    loads = json.loads(kept.read_text(encoding="utf-8"))
    draw(loads, steps, PICTURE)
    print(f"load max / mean: {loads['stock'][0][1]:.2f} at first; after {NUM_STEPS} steps stock "
          f"{loads['stock'][-1][1]:.2f}, ours {loads['ours'][-1][1]:.2f}; drawn in {PICTURE}")  # fmt: skip


if __name__ == "__main__":
    main()
