"""Ways to adapt one model to a domain, side by side, and what each of them makes of it.

``deepseek-moe bench adapt MODEL`` adapts the model to each domain by each method and seed through the stage itself
(``adapt``), with general text replayed and an early stop on it, and measures before and after: bits per byte of every
held-out source, the long tail, knowledge and bias. It may be stopped at any time; the same command goes on.
"""

import argparse
import dataclasses
import functools
import json
import math
import time
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from deepseek_cli.benchmarks.adapt_measures import MeasuredModel, Measures
from deepseek_cli.benchmarks.adapt_picture import draw
from deepseek_cli.benchmarks.adapt_table import Trained, format_tables, summarize
from deepseek_cli.benchmarks.result_files import BenchmarkRun
from deepseek_cli.evaluate import parse_data, parse_limit
from deepseek_records.loading import load_model, resolve_checkpoint
from deepseek_records.run_folder import RunFolder, write_json
from deepseek_training.data.texts import data_name
from deepseek_training.recipes.loading import recipe_settings
from deepseek_training.recipes.pretrain_and_adapt import AdaptRecipe
from deepseek_training.stages.adapt import adapt
from deepseek_training.trainer.lora import adapted_names

METHODS = (
    "full, no replay",
    "full, no stop",
    "full",
    "LoRA on attention",
    "LoRA on experts",
    "ESFT by tokens",
    "ESFT by gate",
)


def run(args: argparse.Namespace) -> int:
    """Adapt and measure what is missing, print the tables, and write figures and pictures.

    Args:
        args: The options of ``deepseek-moe bench adapt``.

    Raises:
        ValueError: An option or a model that cannot work.
    """
    check_options(args)
    resolve_checkpoint(args.model)
    hidden = ("output", "overwrite", "run_command", "subparser", "module", "about", "command", "what")
    settings = {
        name: value
        for name, value in vars(args).items()
        if name not in (*hidden, "traceback", "dry_run", "takes_settings")
    }
    bench = BenchmarkRun("adapt", args.output, settings, overwrite=args.overwrite)
    workshop = Workshop(args, bench.folder.path)
    before = workshop.measure("before", args.model)
    keys = [(domain, method, seed) for seed in range(args.seeds) for domain in args.domains for method in args.methods]
    trained: dict[str, dict[str, list[Trained]]] = {}
    for domain, method, seed in tqdm(keys, desc="adapt", unit="run"):
        one = workshop.train(domain, method, seed)
        trained.setdefault(data_name(domain), {}).setdefault(method, []).append(one)
    figures = summarize(before, trained, general=data_name(args.general))
    tables = format_tables(figures)
    print(tables)
    draw(before, trained, figures, bench.folder.path / "plots")
    bench.finish(figures, tables)
    return 0


def check_options(args: argparse.Namespace) -> None:
    """Raise a one-line ValueError at what would else stop the command later.

    Args:
        args: The options.
    """
    args.methods = args.methods or list(METHODS)
    unknown = [name for name in args.methods if name not in METHODS]
    if unknown:
        raise ValueError(f"methods: got {unknown[0]!r}, expected some of: {'; '.join(METHODS)}")
    for name in ("seeds", "task_seeds", "steps", "rank", "eval_steps"):
        if getattr(args, name) < 1:
            raise ValueError(f"{name}: got {getattr(args, name)}, expected at least 1")
    looks = math.ceil(args.steps / args.eval_steps)
    if args.stop_patience is None:
        args.stop_patience = looks // 2
    if not 0 <= args.stop_patience < looks:
        raise ValueError(f"stop_patience: got {args.stop_patience}, expected at least 0 and below the {looks} looks")
    names = [data_name(one) for one in (*args.domains, args.general, *args.also)]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"domains: got {twice!r} twice among the texts, expected different ones")


@dataclasses.dataclass
class Workshop:
    """What makes and measures models, each once.

    Attributes:
        args: The options.
        root: The benchmark's folder.
    """

    args: argparse.Namespace
    root: Path

    def __post_init__(self) -> None:
        args = self.args
        texts = list(dict.fromkeys([*args.domains, args.general, *args.also]))
        self.measures = Measures(
            model=args.model,
            texts=texts,
            domains=args.domains,
            eval_bytes=args.eval_bytes,
            sequence_length=args.sequence_length,
            tasks=tuple(name for name in args.tasks.split(",") if name),
            limit=parse_limit(args.limit),
            data=parse_data(args.data),
            folder=self.root,
        )

    def measure(self, name: str, model: str | Path, *, has_tasks: bool = True) -> MeasuredModel:
        """Return what is measured of a model, from its file if it was measured before.

        Args:
            name: Of the file.
            model: The model.
            has_tasks: Whether the tasks are asked.
        """
        path = self.root / "measured" / f"{name}.json"
        if path.is_file():
            return MeasuredModel.from_json(json.loads(path.read_text()))
        found = self.measures.measure(model, self.root / "evaluated" / name, has_tasks=has_tasks)
        path.parent.mkdir(exist_ok=True)
        write_json(path, found.to_json())
        return found

    def train(self, domain: str, method: str, seed: int) -> Trained:
        """Return a method's model, adapted and measured.

        Args:
            domain: The text.
            method: One of `METHODS`.
            seed: Of the order of the data, the replay and an adapter.
        """
        name = f"{data_name(domain)}-{method.replace(', ', '-').replace(' ', '-')}-{seed}"
        folder = self.root / "runs" / name
        recipe = self.recipe(domain, method, seed)
        run, seconds = RunFolder(folder), folder.with_suffix(".seconds.json")
        if not (run.is_finished and run.settings == recipe_settings(recipe)):
            began = time.process_time()
            adapt(recipe, folder)
            write_json(seconds, {"cpu_s": time.process_time() - began})
        details = run.summary.details
        return Trained(
            measured=self.measure(name, run.path / "model", has_tasks=seed < self.args.task_seeds),
            num_trained=self._num_trained(run),
            cpu_s=json.loads(seconds.read_text())["cpu_s"],
            kept_step=details.get("kept_step", recipe.max_steps),
            stopped_at=details.get("stopped_at_step"),
        )

    def recipe(self, domain: str, method: str, seed: int) -> AdaptRecipe:
        """Return the settings of the stage.

        Args:
            domain: The text.
            method: One of `METHODS`.
            seed: As for `train`.
        """
        args = self.args
        settings: dict[str, Any] = {
            **{"model": str(args.model), "data": domain, "general_data": args.general, "seed": seed},
            **{"max_steps": args.steps, "batch_size": args.batch_size, "sequence_length": args.sequence_length},
            **{"learning_rate": args.learning_rate, "warmup_steps": min(5, args.steps), "report_to": []},
            **{"replay_share": args.replay_share, "eval_steps": args.eval_steps},
            **{"stop_general_loss": args.stop_loss, "stop_patience": args.stop_patience},
            **{"eval_bytes": max(1000, args.eval_bytes // 2)},
        }
        if method in ("full, no replay", "full, no stop"):
            settings |= {"stop_general_loss": None, "stop_patience": 0, "eval_steps": 0}
        if method == "full, no replay":
            settings |= {"replay_share": 0.0}
        elif not method.startswith("full"):
            settings |= {"learning_rate": args.few_rate, "bias_update_speed": 0.0}
        if method.startswith("LoRA"):
            modules, parameters = self._targets
            names = modules if method == "LoRA on attention" else parameters
            settings |= {"lora_rank": args.rank, "lora_targets": names}
        elif method.startswith("ESFT"):
            settings |= {"esft_top_p": args.top_p, "esft_score": method.rpartition(" ")[2]}
        return AdaptRecipe(**settings)

    @functools.cached_property
    def _targets(self) -> tuple[list[str], list[str]]:
        """What LoRA is put on: linear layers of attention, and the experts' matrices."""
        return adapted_names(load_model(self.args.model))

    def _num_trained(self, run: RunFolder) -> int:
        from safetensors import safe_open

        known = run.summary.details.get("num_trained_parameters")
        if known is not None:
            return int(known)
        adapter = run.path / "adapter" / "adapter_model.safetensors"
        if not adapter.is_file():
            return sum(one.numel() for one in load_model(run.path).parameters())
        with safe_open(adapter, "pt") as tensors:
            return sum(tensors.get_tensor(name).numel() for name in tensors.keys())  # noqa: SIM118
