"""``deepseek-moe bench``: every measurement of the package, one nested subcommand each.

Each prints its table and writes the same figures as JSON into a run folder. The options stand here, apart from what
they start, so that ``--help`` imports neither torch nor transformers.
"""

import argparse
import importlib
from collections.abc import Callable
from dataclasses import dataclass

from deepseek_cli.benchmarks import kernel_table

HELP = "Measure kernels, training steps, PPO, experts and rewards, side by side with the alternatives."
EXAMPLES = """
  deepseek-moe bench kernels --grid quick
  deepseek-moe bench step --rounds 5
  deepseek-moe bench attacks
"""
METHODS = ("ppo", "ppo without guards", "grpo", "rloo")  # of `benchmarks.reward_runs`


@dataclass(frozen=True)
class Benchmark:
    """One nested subcommand.

    Attributes:
        name: The word after ``bench``.
        module: The file under ``benchmarks/`` whose ``run(args)`` measures, and returns the exit code.
        help: One sentence.
        examples: Command lines, one a line, indented.
        add_arguments: Declares the options on the subcommand's parser.
    """

    name: str
    module: str
    help: str
    examples: str
    add_arguments: Callable[[argparse.ArgumentParser], None]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the nested subcommands.

    Args:
        parser: The parser of ``bench``.
    """
    commands = parser.add_subparsers(dest="what", metavar="WHAT", required=True)
    for benchmark in BENCHMARKS:
        nested = commands.add_parser(
            benchmark.name,
            help=benchmark.help,
            description=benchmark.help,
            epilog=f"examples:\n{benchmark.examples.rstrip()}",
            formatter_class=parser.formatter_class,
        )
        benchmark.add_arguments(nested)
        nested.add_argument(
            "--dry-run", action="store_true", help="print what would be measured and where it goes, and write nothing"
        )
        nested.add_argument("--traceback", action="store_true", help="show where an error came from")
        nested.set_defaults(module=benchmark.module, subparser=nested, about=benchmark.help)


def run(args: argparse.Namespace) -> int:
    """Measure, print and save.

    Args:
        args: The parsed options.

    Returns:
        0, 1 when nothing could be compared, 3 when a target was missed.
    """
    if args.dry_run:
        print(_describe(args))
        return 0
    return importlib.import_module(f"deepseek_cli.benchmarks.{args.module}").run(args)


def _describe(args: argparse.Namespace) -> str:
    """What would be measured, with which options, on what, and where it would be written."""
    import torch

    from deepseek_records.output_paths import check_output
    from deepseek_records.run_folder import RunFolder

    output = check_output(args.output)
    if RunFolder(output).is_finished and not args.overwrite:
        raise FileExistsError(f"output: {output} holds a finished run; pass another --output, or --overwrite")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    hidden = (
        "command",
        "what",
        "traceback",
        "run_command",
        "subparser",
        "takes_settings",
        "module",
        "about",
        "dry_run",
    )
    options = {name: value for name, value in vars(args).items() if name not in hidden and value is not None}
    return "\n".join(
        [
            f"bench {args.what}: {args.about}",
            *(f"  {name:<14} {value}" for name, value in options.items() if value not in ([], False)),
            f"  {'on':<14} {device}",
            "  time           not known beforehand; it depends on the machine, and a bar shows what is left",
            "dry run: nothing was written",
        ]
    )


def _add_output(parser: argparse.ArgumentParser, name: str) -> None:
    parser.add_argument("--output", default=f"runs/bench-{name}", help="run folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace a finished run in the folder")


def _add_compile(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--predict", action="store_true", help="TFLOP/s on H100 and H200 by a roofline model of the compiled kernels"
    )
    parser.add_argument(
        "--measured", metavar="FILE", help="with --predict: results.json of bench kernels on one of them, to compare"
    )
    _add_output(parser, "compile")


def _add_step(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=15, help="timed steps of each model, at least 1")
    parser.add_argument("--threads", type=int, help="torch's threads (default: OMP_NUM_THREADS decides)")
    parser.add_argument("--experts", type=int, choices=[32, 128], help="one of the two shapes only")
    _add_output(parser, "step")


def _add_lora(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=15, help="timed steps of each kind, at least 1")
    parser.add_argument("--rank", type=int, default=8, help="of the adapters, at least 1")
    parser.add_argument("--threads", type=int, help="torch's threads (default: OMP_NUM_THREADS decides)")
    _add_output(parser, "lora")


def _add_ppo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=8, help="timed updates of each class, at least 2")
    _add_output(parser, "ppo")


def _add_experts(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--counts", nargs="+", default=["8", "12", "8-12"], help="for example 8 12 8-12")
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds, at least 1")
    parser.add_argument("--recipe", default="pretrain-expert-count", help="name or YAML file of a pretrain recipe")
    parser.add_argument("--timing-rounds", type=int, default=40, help="timed steps of each variant, at least 1")
    _add_output(parser, "experts")


def _add_rewards(parser: argparse.ArgumentParser) -> None:
    from deepseek_training.recipes.align import AlignRecipe
    from deepseek_training.recipes.loading import add_recipe_arguments

    add_recipe_arguments(parser, AlignRecipe)
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help=f"some of: {', '.join(METHODS)} (default: all)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="seeds, each trained by each method")
    parser.add_argument("--num-samples", type=int, default=4, help="completions of each held-out prompt, at least 1")
    parser.add_argument("--max-kl", type=float, default=15.0, help="target: PPO's KL, nats per completion")
    _add_output(parser, "rewards")


def _add_serving(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        metavar="MODEL",
        nargs="?",
        default="built",
        help="a deepseek_v3 checkpoint; built: a small one of random weights that every server can load",
    )
    parser.add_argument("--prompts", type=int, default=64, help="asked in each round, at least 1")
    parser.add_argument("--max-tokens", type=int, default=32, help="of each answer, at least 1")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds of each number of clients, at least 1")
    parser.add_argument("--most-clients", type=int, default=64, help="1, 2, 4 and so on up to this many at once")
    _add_output(parser, "serving")


def _add_edge(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a checkpoint of a family that export --to onnx takes")
    parser.add_argument("--prompts", type=int, default=20, help="beginnings of held-out books, at least 1")
    parser.add_argument("--max-tokens", type=int, default=64, help="of each continuation, at least 1")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds over all prompts, at least 1")
    parser.add_argument("--runtime", metavar="DIR", help="as for export --to browser")
    _add_output(parser, "edge")


def _add_update(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help="some of the table's, quoted (default: all)")
    parser.add_argument("--seeds", type=int, default=3, help="sequences of each method, at least 1")
    parser.add_argument("--steps", type=int, default=30, help="of each update, at least 1")
    parser.add_argument("--first-steps", type=int, default=200, help="of the first model's pretraining, at least 1")
    _add_output(parser, "update")


def _add_adapt(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", nargs="?", default="runs/demo/pretrain/model", help="a model with experts"
    )
    parser.add_argument(
        "--domains", nargs="+", default=["medicine", "finance"], help="texts to adapt to, as for adapt"
    )
    parser.add_argument("--general", default="books", help="general text, replayed and watched for forgetting")
    parser.add_argument("--also", nargs="*", default=["prose_zh"], help="further held-out texts to measure")
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help="some of the table's, quoted (default: all)")
    parser.add_argument("--seeds", type=int, default=3, help="of each method, at least 1")
    parser.add_argument("--task-seeds", type=int, default=1, help="how many of them are asked the tasks, at least 1")
    parser.add_argument("--steps", type=int, default=40, help="at most, at least 1")
    parser.add_argument("--eval-steps", type=int, default=10, help="steps between looks at the general text")
    parser.add_argument("--batch-size", type=int, default=4, help="blocks per step")
    parser.add_argument("--sequence-length", type=int, default=256, help="tokens of a block")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="where all weights train")
    parser.add_argument("--few-rate", type=float, default=5e-3, help="where few do: LoRA and ESFT")
    parser.add_argument("--replay-share", type=float, default=0.4, help="of the blocks that are general text")
    parser.add_argument("--stop-loss", type=float, default=0.02, help="relative loss of general text that ends a run")
    parser.add_argument("--stop-patience", type=int, help="looks in a row above it that end no run (default: half)")
    parser.add_argument("--rank", type=int, default=8, help="of the adapters, at least 1")
    parser.add_argument("--top-p", type=float, default=0.3, help="share of the text whose experts ESFT trains")
    parser.add_argument("--eval-bytes", type=int, default=20_000, help="of each held-out source to score")
    parser.add_argument("--tasks", default="mmlu,pubmedqa,winobias,bbq", help="of evaluate, or '' for none")
    parser.add_argument(
        "--limit", default="mmlu=10,pubmedqa=40,winobias=30,bbq=10", help="questions of each task, as for evaluate"
    )
    parser.add_argument("--data", help="as for evaluate, for example crows_pairs=crows_pairs_anonymized.csv")
    _add_output(parser, "adapt")


def _add_smaller(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a folder or Hub id, of ours or another family with experts")
    parser.add_argument("--group", type=int, default=128, help="weights that share a scale, as for quantize")
    parser.add_argument("--cuts", nargs="+", type=int, default=[25, 50, 75], help="percents of the experts to cut")
    parser.add_argument("--recipe", default="distill-heal", help="name or YAML file of the distill recipe that heals")
    parser.add_argument("--calibration-tokens", type=int, default=16384, help="tokens that calibrate the rounding")
    parser.add_argument("--eval-bytes", type=int, default=150_000, help="of held-out text to measure on")
    parser.add_argument("--seed", type=int, default=0, help="of the healing")
    _add_output(parser, "smaller")


def _add_attacks(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--encoder", help="sentence encoder in place of the embedded one: folder, Hub id, or minilm if installed"
    )
    _add_output(parser, "attacks")


BENCHMARKS = (
    Benchmark("kernels", "kernel_table", kernel_table.HELP, kernel_table.EXAMPLES, kernel_table.add_arguments),
    Benchmark(
        "compile",
        "kernel_prediction",
        "Compile every GPU kernel for GPUs that are not here: registers, spills, shared memory.",
        """
  deepseek-moe bench compile
  deepseek-moe bench compile --output /tmp/compile
  deepseek-moe bench compile --predict
  deepseek-moe bench compile --predict --measured runs/bench-kernels/results.json
""",
        _add_compile,
    ),
    Benchmark(
        "step",
        "step_cost",
        "Time a training step with balancing on against stock transformers' DeepSeek-V3.",
        """
  deepseek-moe bench step
  deepseek-moe bench step --experts 32 --rounds 5 --threads 1
""",
        _add_step,
    ),
    Benchmark(
        "lora",
        "lora_cost",
        "Time a step with LoRA on experts against frozen experts, full training and PEFT's merged copy.",
        """
  deepseek-moe bench lora
  deepseek-moe bench lora --rank 16 --rounds 5 --threads 1
""",
        _add_lora,
    ),
    Benchmark(
        "ppo",
        "ppo_cost",
        "Time a PPO update against TRL's own class on the same work.",
        """
  deepseek-moe bench ppo
  deepseek-moe bench ppo --rounds 2 --output /tmp/ppo
""",
        _add_ppo,
    ),
    Benchmark(
        "experts",
        "expert_count",
        "Train fixed and dynamic numbers of experts per token: bits per byte at equal steps.",
        """
  deepseek-moe bench experts
  deepseek-moe bench experts --counts 8 8-12 --seeds 1

Finished runs in the folder are taken as they are; an interrupted one goes on.
""",
        _add_experts,
    ),
    Benchmark(
        "rewards",
        "reward_learning",
        "Train PPO, GRPO and RLOO on the weighted reward over seeds, and measure all alike.",
        """
  deepseek-moe bench rewards align-demo --model runs/demo/sft/model --prompt-template null
  deepseek-moe bench rewards align-debug --model my-model --methods ppo grpo --seeds 0

Finished runs in the folder are taken as they are; one that stopped begins again.
""",
        _add_rewards,
    ),
    Benchmark(
        "attacks",
        "attacks",
        "Score attacks on the rewards: how often does an honest answer stand above them all?",
        """
  deepseek-moe bench attacks
  deepseek-moe bench attacks --encoder minilm --output runs/bench-attacks-minilm
""",
        _add_attacks,
    ),
    Benchmark(
        "update",
        "update_methods",
        "Teach a small model five texts one after another by nine methods: what is gained and forgotten.",
        """
  deepseek-moe bench update
  deepseek-moe bench update --methods naive "replay + merge" --seeds 1 --output /tmp/update

An interrupted one goes on behind the last sequence that it finished.
""",
        _add_update,
    ),
    Benchmark(
        "adapt",
        "adapt_methods",
        "Adapt a model to domains by seven methods: learned, forgotten, long tail, knowledge and bias.",
        """
  deepseek-moe bench adapt runs/demo/pretrain/model
  deepseek-moe bench adapt path/to/moe --domains my_texts/ --general general.jsonl --also --tasks pubmedqa --limit 100
  deepseek-moe bench adapt --tasks crows_pairs,bbq --limit 200 --data crows_pairs=crows_pairs_anonymized.csv

An interrupted one goes on behind the last model that it finished.
""",
        _add_adapt,
    ),
    Benchmark(
        "serving",
        "serving",
        "Time our servers and others' with 1 to 64 clients, and compare the answers.",
        """
  deepseek-moe bench serving
  deepseek-moe bench serving MODEL --prompts 16 --rounds 1 --most-clients 16
""",
        _add_serving,
    ),
    Benchmark(
        "edge",
        "edge",
        "Time one small model in the runtimes of phones and browsers, and compare the text.",
        """
  deepseek-moe bench edge runs/demo/align
  PYTHONPATH=build/edge/executorch deepseek-moe bench edge runs/demo/align --runtime build/edge/browser
""",
        _add_edge,
    ),
    Benchmark(
        "smaller",
        "smaller",
        "Size on disk against bits per byte: rounded experts, fewer experts, healed ones, both.",
        """
  deepseek-moe bench smaller runs/demo/pretrain/model --group 32
  deepseek-moe bench smaller runs/demo/pretrain/model --group 32 --cuts 50 --output runs/half

Finished stages in the folder's variants/ are taken as they are; an interrupted one goes on.
""",
        _add_smaller,
    ),
)
