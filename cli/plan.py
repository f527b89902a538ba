"""``deepseek-moe plan``: what a large training needs, before anybody pays for it."""

import argparse
import json
from pathlib import Path
from typing import Any

HELP = "Print what a training on many GPUs needs: layout, memory, traffic, hours, energy, checkpoints."
EXAMPLES = """
  deepseek-moe plan 154b --gpus 10000 --gpu h100
  deepseek-moe plan 154b --gpus 1024 --gpu h200 --precision fp8 --tokens 2e11
  deepseek-moe plan 154b --gpus 512 --engine transformers
  deepseek-moe plan 7.7b --gpus 64 --data 64 --zero 3 --expert 8 --recompute full
  deepseek-moe plan 154b --gpus 10000 --simulate
  deepseek-moe plan --check
"""
_LAYOUT = ("data", "tensor", "pipeline", "virtual", "expert", "zero")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "model",
        nargs="?",
        help="a preset, a recipe (only its model is read), a run folder or a checkpoint",
    )
    parser.add_argument("--gpus", type=int, metavar="N", help="how many there are")
    parser.add_argument("--gpu", default="h100", help="which: a100, h100, h800, h200 or b200")
    parser.add_argument("--tokens", type=float, default=1.2e12, help="tokens to train on")
    parser.add_argument("--batch", type=int, default=15360, help="sequences per optimizer step (DeepSeek-V3's)")
    parser.add_argument("--length", type=int, default=4096, help="tokens per sequence")
    parser.add_argument("--micro-batch", type=int, default=1, help="sequences per pass")
    parser.add_argument("--experts-per-token", type=float, help="routed experts per token (default: the target)")
    parser.add_argument("--precision", choices=("bf16", "fp8"), default="bf16", help="of the products")
    for name in _LAYOUT:
        parser.add_argument(f"--{name}", type=int, metavar="N", help=f"fix the layout's {name} (default: searched)")
    parser.add_argument("--recompute", choices=("none", "selective", "full"), help="fix it (default: searched)")
    parser.add_argument("--schedule", choices=("1f1b", "dualpipe"), default="1f1b", help="of the pipeline")
    parser.add_argument("--overlap-experts", action="store_true", help="tokens are exchanged beside products")
    parser.add_argument("--moment-bytes", type=int, default=4, help="bytes of one of AdamW's moments: 4, 2 or 1")
    parser.add_argument(
        "--engine",
        choices=("any", "transformers"),
        default="any",
        help="transformers: neither pipeline nor tensor parallelism",
    )
    parser.add_argument("--failure-hours", type=float, help="mean hours of one GPU between failures (Llama 3's)")
    parser.add_argument("--storage-gb-per-s", type=float, default=100.0, help="write rate of the whole storage")
    parser.add_argument("--restart-s", type=float, default=600.0, help="from a failure to the start, without loading")
    parser.add_argument("--simulate", action="store_true", help="play failures of every GPU against the cadence")
    parser.add_argument("--check", action="store_true", help="hold the estimate against published runs, and stop")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the plan to a file as well")


def run(args: argparse.Namespace) -> int:
    """Print the plan."""
    if args.check:
        _refuse_beside_check(args)
        print(_check())
        return 0
    if args.model is None or args.gpus is None:
        raise ValueError("plan: got no MODEL or no --gpus, expected both (or --check)")
    _check_numbers(args)
    from deepseek_records.output_paths import make_file_place
    from deepseek_training.launch.cluster.report import as_record, describe

    plan = _plan(args)
    if args.json is not None:
        make_file_place(args.json, "--json")
    print(describe(plan))
    if args.simulate:
        print(_simulate(plan))
    if args.json is not None:
        args.json.write_text(json.dumps(as_record(plan), indent=1) + "\n", encoding="utf-8")
        print(f"plan written to {args.json}")
    return 0


def _refuse_beside_check(args: argparse.Namespace) -> None:
    """Raise at an option that changes nothing beside --check."""
    own = ("command", "check", "traceback", "run_command", "subparser", "takes_settings", "settings")
    for name, value in vars(args).items():
        if name not in own and value != args.subparser.get_default(name):
            option = "MODEL" if name == "model" else f"--{name.replace('_', '-')}"
            raise ValueError(f"{option}: got {value} beside --check, expected it alone; --check plans nothing")


def _check_numbers(args: argparse.Namespace) -> None:
    for name in ("gpus", "tokens", "batch", "length", "micro_batch", "failure_hours", "storage_gb_per_s", "restart_s"):
        value = getattr(args, name)
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"--{name.replace('_', '-')}: got {value:g}, expected a number above 0")
    if args.engine == "transformers":
        for name in ("pipeline", "tensor", "virtual"):
            if getattr(args, name) not in (None, 1):
                raise ValueError(f"--{name}: got {getattr(args, name)}, expected 1 with --engine transformers")
    if args.schedule == "dualpipe" and args.virtual not in (None, 1):
        raise ValueError(f"--virtual: got {args.virtual}, expected 1 with --schedule dualpipe")


def _plan(args: argparse.Namespace) -> Any:
    from deepseek_cli.params import load_config
    from deepseek_training.launch.cluster.devices import find_device
    from deepseek_training.launch.cluster.failures import DEVICE_HOURS_PER_FAILURE
    from deepseek_training.launch.cluster.layout import Layout, check_layout, check_values
    from deepseek_training.launch.cluster.report import Run, make_plan
    from deepseek_training.launch.cluster.search import find_layouts
    from deepseek_training.launch.cluster.shape import read_shape

    device = find_device(args.gpu)
    shape = read_shape(load_config(args.model, {}), args.model, args.experts_per_token)
    given = {name: getattr(args, name) for name in (*_LAYOUT, "recompute") if getattr(args, name) is not None}
    if args.engine == "transformers":
        given |= {"pipeline": 1, "tensor": 1, "virtual": 1}
    if args.schedule == "dualpipe":
        given |= {"virtual": 1}
    asked = Layout(
        **{"data": 1, **given},
        micro_batch=args.micro_batch,
        batch=args.batch,
        length=args.length,
        schedule=args.schedule,
        overlaps_experts=args.overlap_experts,
        precision=args.precision,
        moment_bytes=args.moment_bytes,
    )
    check_values(asked, shape)
    if "data" in given:
        check_layout(asked, shape)
        if asked.world > args.gpus:
            raise ValueError(f"--data: got a layout of {asked.world:,} GPUs, expected at most --gpus {args.gpus:,}")
    found = find_layouts(shape, device, args.gpus, asked, set(given))
    if not found:
        raise ValueError(
            f"--gpus: got {args.gpus:,} x {device.name}, expected more or larger ones, --recompute full or another "
            f"--batch: no layout of {args.model} fits"
        )
    run_settings = Run(
        tokens=args.tokens,
        device_hours=args.failure_hours or DEVICE_HOURS_PER_FAILURE,
        storage=args.storage_gb_per_s * 1e9,
        restart_s=args.restart_s,
    )
    return make_plan(shape, device, args.gpus, run_settings, found[0])


def _simulate(plan: Any) -> str:
    """Goodput against cadence: the formula, and five simulated runs of at most thirty days each."""
    import statistics

    from deepseek_training.launch.cluster.failures import expected_goodput, simulate

    work = min(plan.hours * 3600, 30 * 86400.0)
    lines = [f"{'checkpoint every':<22}{'formula':>9}{'simulated':>11}{'error':>8}"]
    for factor in (0.25, 0.5, 1, 2, 4, 8):
        interval = plan.interval_s * factor
        runs = [
            simulate(
                work,
                interval,
                plan.checkpoint,
                num_devices=plan.layout.world,
                device_s=plan.run.device_hours * 3600,
                seed=seed,
            )
            for seed in range(5)
        ]
        expected = expected_goodput(interval, plan.checkpoint, plan.failure_s)
        error = statistics.stdev(runs) / len(runs) ** 0.5
        lines.append(f"{interval / 60:>13.1f} min     {expected:>9.2%}{statistics.fmean(runs):>11.2%}{error:>8.2%}")
    return "\n".join(lines)


def _check() -> str:
    from deepseek_training.launch.cluster.published import published_runs, typical_error
    from deepseek_training.launch.cluster.report import TYPICAL_FACTOR

    lines = [f"{'published run':<46}{'published':>10}{'estimate':>10}{'ratio':>7}   TFLOP/s per device"]
    ratios = []
    for row in published_runs():
        ratios.append(row.ratio())
        estimate = row.estimate().flops_per_second / 1e12
        lines.append(f"{row.name:<46}{row.flops_per_second / 1e12:>10.0f}{estimate:>10.0f}{ratios[-1]:>7.2f}")
    lines.append(
        f"typical factor {typical_error(ratios):.2f}; {TYPICAL_FACTOR} where a row is left out of the choice of rates"
    )
    return "\n".join(lines)
