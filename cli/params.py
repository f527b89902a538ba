"""``deepseek-moe params``: parameters by part and FLOPs a token, of a preset, a recipe's settings or a checkpoint."""

import argparse
from pathlib import Path
from typing import Any

HELP = "Print a model's parameters by part, its active share and its FLOPs per token."
EXAMPLES = """
  deepseek-moe params 154b
  deepseek-moe params 154b --experts-per-token 10 --context-length 32768
  deepseek-moe params runs/demo/align/model
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("model", help="a preset (154b, 7.7b, nano, debug) or a folder with a config.json")
    parser.add_argument("--experts-per-token", type=float, help="routed experts a token (default: the most)")
    parser.add_argument("--context-length", type=int, default=4096, help="context that attention is counted for")


def run(args: argparse.Namespace) -> int:
    """Print the table."""
    from modeling_deepseek.parameter_count import count_parameters

    config = load_config(args.model)
    if args.context_length < 1:
        raise ValueError(f"--context-length: {args.context_length} is not allowed, want at least 1")
    wanted, low = args.experts_per_token, config.min_experts_per_tok or config.num_experts_per_tok
    if wanted is not None and not low <= wanted <= config.num_experts_per_tok:
        raise ValueError(f"--experts-per-token: {wanted} is not allowed, want {low} to {config.num_experts_per_tok}")
    print(format_count(args.model, count_parameters(config, wanted), args.context_length))
    return 0


def load_config(name: str) -> Any:
    """Return the configuration of a preset or of a checkpoint.

    Args:
        name: A preset's name or a folder.

    Raises:
        FileNotFoundError: It is neither.
    """
    from modeling_deepseek import DeepseekConfig
    from modeling_deepseek.presets import PRESETS

    if name in PRESETS:
        return DeepseekConfig.from_preset(name)
    if not (Path(name) / "config.json").is_file():
        raise FileNotFoundError(
            f"model: {name!r} is neither a preset ({', '.join(PRESETS)}) nor a folder with config.json"
        )
    from deepseek_records.json_files import read_object

    read_object(Path(name) / "config.json", "model")
    return DeepseekConfig.from_pretrained(name)


def format_count(name: str, count: Any, context_length: int) -> str:
    """Return the table as text.

    Args:
        name: What was counted.
        count: A `ParameterCount`.
        context_length: Tokens in the context.
    """
    lines = [f"{name}: {count.mean_experts_per_tok:g} routed experts a token", ""]
    lines.append(f"{'part':<20}{'parameters':>18}{'share':>9}{'active per token':>20}")
    for part, number in count.parts.items():
        lines.append(f"{part:<20}{number:>18,}{number / count.total:>9.2%}{round(count.active_parts[part]):>20,}")
    lines.append(f"{'total':<20}{count.total:>18,}{1:>9.2%}{round(count.active):>20,}")
    sparse = count.flops_per_token(context_length)
    dense = count.flops_per_token(context_length, is_dense=True)
    lines += [
        "",
        f"active per token     {count.active / count.total:.2%} of the parameters",
        f"forward FLOPs/token  {sparse:.4g} at a context of {context_length} (training: three times that)",
        f"dense equivalent     {dense:.4g}, every expert run: {1 - sparse / dense:.1%} saved",
    ]
    return "\n".join(lines)
