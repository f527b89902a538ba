"""From the demo's model to a twentieth of it: four halvings, each healed, against one cut and against new weights.

    python dev/nano_halvings.py runs/demo/pretrain/model [--seeds 3] [--steps 150] [--output runs/halvings]

The way of docs/making_it_smaller.md from 154 B to 7.7 B, at a size that trains here: the same plan of rounds, each a
slice of the model before, which is its teacher. The other ways to the last size train on as many tokens: the whole cut
at once, new weights with the teacher beside them, and new weights on the text alone. Every step is `deepseek-moe
distill`; at the end `deepseek-moe evaluate` asks MMLU and HumanEval. A run that has finished is not run again.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from deepseek_cli.main import main as run_command
from deepseek_model_cards.benchmarks import compare_to_chance
from deepseek_records.loading import load_config
from deepseek_records.run_folder import RunFolder
from deepseek_records.statistics import mean_with_error
from deepseek_training.compress.halving import plan_halvings
from deepseek_training.compress.student_config import CUT, student_config
from modeling_deepseek.parameter_count import count_parameters

ROUNDS = 4
# A twentieth of the demo's model.
SMALLEST = {
    **{"hidden_size": 40, "intermediate_size": 80, "moe_intermediate_size": 24, "kv_lora_rank": 32},
    **{"num_hidden_layers": 2, "num_attention_heads": 2, "n_routed_experts": 4},
    **{"num_experts_per_tok": 2, "min_experts_per_tok": 1},
}
MULTIPLES = {"hidden_size": 8, "intermediate_size": 8, "moe_intermediate_size": 8, "kv_lora_rank": 8}
WAYS = {
    "four halvings, each healed": ["--start", "shrink"],
    "cut at once, healed": ["--start", "shrink"],
    "new weights, taught": ["--start", "fresh"],
    "new weights, text alone": ["--start", "fresh", "--distill-weight", "0"],
}


def distill(
    teacher: Path, student: dict[str, Any], output: Path, steps: int, seed: int, words: list[str]
) -> RunFolder:
    """Make one student by the command, unless that was done."""
    run = RunFolder(output)
    if not run.is_finished:
        settings = ["--teacher", str(teacher), "--student", json.dumps(student), "--max-steps", str(steps)]
        settings += ["--seed", str(seed), "--save-steps", "0", "--sample-prompts", "[]", "--output", str(output)]
        code = run_command(["distill", "distill-demo", *settings, *words])
        if code not in (0, 3):
            raise SystemExit(code)
    return run


def take_ways(
    teacher: Path, sizes: list[dict[str, Any]], root: Path, steps: int, seed: int
) -> dict[str, list[RunFolder]]:
    """Return the runs of each way, of the halvings one per round."""
    found: dict[str, list[RunFolder]] = {}
    for way, words in WAYS.items():
        folder = root / f"seed{seed}" / way.replace(", ", "-").replace(" ", "-")
        if way.startswith("four"):
            found[way], before = [], teacher
            for number, size in enumerate(sizes, start=1):
                found[way].append(distill(before, size, folder / f"round{number}", steps, seed, words))
                before = found[way][-1].model_path
        else:
            found[way] = [distill(teacher, sizes[-1], folder, steps * len(sizes), seed, words)]
    return found


def bits(run: RunFolder, when: str) -> float:
    """Bits per byte of a student."""
    return next(one.value for one in run.summary.results if one.when == when)


def imbalance(run: RunFolder) -> float:
    """The largest load of an expert over the mean, in the worst layer."""
    return max(max(layer) * len(layer) / sum(layer) for layer in run.summary.tokens_per_expert)


def shown(values: list[float], spec: str = ".4f") -> str:
    """A mean, with its standard error where there are several values."""
    mean, error = mean_with_error(values)
    return format(mean, spec) if error is None else f"{mean:{spec}} +- {error:{spec.lstrip('+')}}"


def main() -> None:
    """Run all ways of all seeds and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=150, help="of each round")
    parser.add_argument("--output", type=Path, default=Path("runs/halvings"))
    args = parser.parse_args()
    teacher = load_config(args.teacher)
    plan = plan_halvings(
        teacher,
        student_config(teacher, SMALLEST),
        ROUNDS,
        tokens=1,
        flops_per_second=1,
        multiples=MULTIPLES,
    )
    names = (*CUT, "min_experts_per_tok")
    sizes = [
        {name: getattr(one.config, name) for name in names if getattr(one.config, name) != getattr(teacher, name)}
        for one in plan
    ]
    seeds = [take_ways(args.teacher, sizes, args.output, args.steps, seed) for seed in range(args.seeds)]
    rounds = [ways["four halvings, each healed"] for ways in seeds]
    taught = rounds[0][0].summary.details["teacher_bits_per_byte"]
    print(f"teacher: {count_parameters(teacher).total:,} parameters, {taught:.4f} bits per byte")
    print("| round | parameters | hidden | layers | heads | experts | before | after | load, max / mean |")
    for number, one in enumerate(plan):
        config, of_round = one.config, [runs[number] for runs in rounds]
        sized = (config.hidden_size, config.num_hidden_layers, config.num_attention_heads, config.n_routed_experts)
        cells = [str(number + 1), f"{one.parameters:,}", *map(str, sized)]
        cells += [shown([bits(run, when) for run in of_round]) for when in ("before", "after")]
        print(f"| {' | '.join([*cells, shown([imbalance(run) for run in of_round], '.2f')])} |")
    print("| way to the last size | before | after | more than by halvings, paired | load, max / mean | benchmarks |")
    for way in WAYS:
        last = [ways[way][-1] for ways in seeds]
        more = [bits(run, "after") - bits(of_seed[-1], "after") for run, of_seed in zip(last, rounds, strict=True)]
        cells = [way, *(shown([bits(run, when) for run in last]) for when in ("before", "after"))]
        cells += [
            "" if last[0] is rounds[0][-1] else shown(more, "+.4f"),
            shown([imbalance(run) for run in last], ".2f"),
        ]
        print(f"| {' | '.join([*cells, score(last[0], args.output)])} |", flush=True)


def score(run: RunFolder, root: Path) -> str:
    """What MMLU and HumanEval say of a student, against chance."""
    output = RunFolder(root / f"scores-{run.path.parent.name}-{run.path.name}")
    if not output.is_finished:
        words = ["--tasks", "mmlu,humaneval", "--limit", "mmlu=2,humaneval=20", "--max-new-tokens", "96"]
        run_command(["evaluate", str(run.path), *words, "--output", str(output.path)])
    return "; ".join(f"{one.dataset} {one.value:.3f}, {compare_to_chance(one)}" for one in output.summary.results)


if __name__ == "__main__":
    main()
