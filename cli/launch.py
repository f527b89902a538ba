"""``deepseek-moe launch``: the file that starts a stage on many machines."""

import argparse
import importlib
import sys
from pathlib import Path
from typing import Any

HELP = "Write the file that starts a stage on several processes: one machine, Slurm, Kubernetes or Ray."
EXAMPLES = """
  deepseek-moe launch pretrain-1b --on local --gpus-per-node 8 --output runs/1b
  deepseek-moe launch my_recipe.yaml --stage pretrain --on slurm --nodes 64 --engine zero3 --output runs/large
  deepseek-moe launch adapt-demo --on kubernetes --nodes 4 --image me/moe:1 --claim runs --output /runs/adapt
  deepseek-moe launch pretrain-debug --on slurm --cpu --processes-per-node 2 --output runs/first --seed 3

--setting value replaces a setting of the recipe.
"""
TAKES_SETTINGS = True
# Each stage's recipe class.
_RECIPES = {
    "pretrain": "pretrain_and_adapt.PretrainRecipe",
    "adapt": "pretrain_and_adapt.AdaptRecipe",
    "sft": "sft.SftRecipe",
    "distill": "distill.DistillRecipe",
    "align": "align.AlignRecipe",
    "grpo": "grpo.GrpoRecipe",
    "dpo": "dpo.DpoRecipe",
}

# Options that not every place has a use for.
_USED_BY = {
    "partition": ("slurm",),
    "time": ("slurm",),
    "image": ("kubernetes",),
    "claim": ("kubernetes",),
    "name": ("slurm", "kubernetes", "ray"),
    "python": ("local", "slurm", "kubernetes"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    from deepseek_training.launch.job import ENGINES, PLACES

    parser.add_argument("recipe", metavar="RECIPE", help="an embedded name, or a file that every node sees")
    parser.add_argument("--stage", choices=tuple(_RECIPES), help="the command (default: the only one that takes it)")
    parser.add_argument("--output", required=True, help="run folder, on storage that every node sees")
    parser.add_argument("--on", choices=tuple(PLACES), default="local", help="where")
    parser.add_argument("--nodes", type=int, default=1, help="machines")
    parser.add_argument("--gpus-per-node", type=int, default=8, help="one process for each")
    parser.add_argument("--cpu", action="store_true", help="train without GPUs, with --processes-per-node")
    parser.add_argument("--processes-per-node", type=int, help="with --cpu")
    parser.add_argument("--engine", choices=ENGINES, default="ddp", help="how the model is divided")
    parser.add_argument("--time", default="1-00:00:00", help="slurm: longest run, [DAYS-]HOURS:MINUTES:SECONDS")
    parser.add_argument("--restarts", type=int, default=10, help="how often a failed job starts again by itself")
    parser.add_argument("--name", default="deepseek-moe", help="of the job, but with local")
    parser.add_argument("--partition", default="", help="slurm: partition")
    parser.add_argument("--image", default="", help="kubernetes: container image with this package")
    parser.add_argument("--claim", default="", help="kubernetes: PersistentVolumeClaim that holds the run folder")
    parser.add_argument("--python", default=sys.executable, help="the interpreter on the nodes")
    parser.add_argument("--file", type=Path, help="write there instead of to the terminal")


def run(args: argparse.Namespace) -> int:
    """Check the stage's own words and write the file."""
    from deepseek_records.output_paths import make_file_place
    from deepseek_training.launch.job import Job, check_job, recipe_for_nodes, render_job
    from deepseek_training.recipes.loading import parse_overrides

    if args.cpu != (args.processes_per_node is not None):
        raise ValueError("--processes-per-node: got one of it and --cpu, expected both or neither")
    _refuse_unused(args)
    python = "python" if args.on in ("kubernetes", "ray") and args.python == sys.executable else args.python
    job = Job(
        stage=args.stage or _find_stage(args.recipe, args.settings),
        recipe=recipe_for_nodes(args.recipe),
        output=args.output if args.on == "kubernetes" else str(Path(args.output).resolve()),
        settings=tuple(args.settings),
        name=args.name,
        nodes=args.nodes,
        processes_per_node=args.processes_per_node if args.cpu else args.gpus_per_node,
        uses_gpus=not args.cpu,
        engine=args.engine,
        time=args.time,
        restarts=args.restarts,
        image=args.image,
        claim=args.claim,
        partition=args.partition,
        python=python,
    )
    check_job(job, args.on)
    recipe = _load(args.recipe, job.stage, parse_overrides(args.settings))  # refuses now what every node would refuse
    if args.engine != "ddp" and getattr(recipe, "optimizer", "adamw") != "adamw":
        raise ValueError(f"optimizer: got {recipe.optimizer} with --engine {args.engine}, expected adamw")
    if job.stage in ("align", "grpo", "dpo") and args.engine not in ("ddp", "zero3"):
        raise ValueError(f"--engine: got {args.engine}, expected ddp or zero3 for {job.stage}")
    if job.stage in ("align", "grpo") and args.engine == "zero3" and recipe.lora_rank:
        raise ValueError(f"lora_rank: got {recipe.lora_rank} with --engine zero3, expected 0 for {job.stage}")
    if getattr(recipe, "save_in_background", False) and args.engine not in ("fsdp2_sharded", "expert_parallel"):
        raise ValueError(f"save_in_background: got True with --engine {args.engine}, expected fsdp2_sharded")
    text = render_job(job, args.on)
    if args.file is None:
        print(text, end="")
        return 0
    make_file_place(args.file, "--file").write_text(text, encoding="utf-8")
    start = {"local": "bash", "slurm": "sbatch", "kubernetes": "kubectl apply -f", "ray": "python"}[args.on]
    print(f"{args.file}: start it with `{start} {args.file}`")
    return 0


def _refuse_unused(args: argparse.Namespace) -> None:
    """Raise at an option that the file for this place does not hold."""
    for name, places in _USED_BY.items():
        value = getattr(args, name)
        if args.on not in places and value != args.subparser.get_default(name):
            raise ValueError(
                f"--{name}: got {value!r} with --on {args.on}, expected it with {' or '.join(places)} only"
            )
    if args.cpu and args.gpus_per_node != args.subparser.get_default("gpus_per_node"):
        raise ValueError(f"--gpus-per-node: got {args.gpus_per_node} with --cpu, expected --processes-per-node alone")
    if not args.cpu and args.gpus_per_node < 1:
        raise ValueError(f"--gpus-per-node: got {args.gpus_per_node}, expected at least 1")


def _find_stage(recipe: str, settings: list[str]) -> str:
    """The stage of an embedded recipe by its name, of a file by which stage takes it."""
    from deepseek_training.recipes.loading import list_recipes, parse_overrides

    if recipe in list_recipes() and recipe.split("-")[0] in _RECIPES:
        return recipe.split("-")[0]
    errors = {}
    for stage in _RECIPES:
        try:
            _load(recipe, stage, parse_overrides(settings))
        except ValueError as error:
            errors[stage] = str(error)
    takes = [stage for stage in _RECIPES if stage not in errors]
    if len(takes) != 1:
        found = f"a recipe that {', '.join(takes)} take" if takes else f"a recipe that no stage takes ({recipe})"
        raise ValueError(f"--stage: got {found}, expected one of {', '.join(_RECIPES)}")
    return takes[0]


def _load(recipe: str, stage: str, settings: dict[str, Any]) -> Any:
    from deepseek_training.recipes.loading import load_recipe

    module, name = _RECIPES[stage].split(".")
    recipe_class = getattr(importlib.import_module(f"deepseek_training.recipes.{module}"), name)
    return load_recipe(recipe, recipe_class, settings)
