"""Is a dynamic number of experts worth it: bits per byte against the mean number, at equal steps.

``deepseek-moe bench experts`` trains the recipe ``pretrain-expert-count`` once for every seed and number
of experts, on the embedded books, and prints the table. Runs of one seed share initialization and data order, so
differences are paired by seed. It may be stopped at any time; the same command again takes finished runs
as they are and goes on with the unfinished one.
"""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from deepseek_cli.benchmarks.result_files import write_over_runs
from deepseek_cli.benchmarks.step_cost import median_step_times
from deepseek_records.loading import load_tokenizer
from deepseek_records.run_folder import RunFolder
from deepseek_records.statistics import mean_with_error
from deepseek_training.data.packing import PackedDataset, cut_to_share, encode_documents
from deepseek_training.data.texts import load_texts
from deepseek_training.recipes.loading import load_recipe, recipe_settings
from deepseek_training.stages.pretrain import PretrainRecipe, pretrain
from deepseek_training.trainer.new_model import model_config
from modeling_deepseek.families import find_moe_layers
from modeling_deepseek.parameter_count import count_parameters


def parse_count(count: str) -> dict[str, Any]:
    """Return the model's settings for a number of experts such as ``8``, or ``8-12`` held halfway between.

    Args:
        count: One whole number, or two joined by a hyphen.

    Raises:
        ValueError: It is neither, or the range goes down.
    """
    low, hyphen, high = count.partition("-")
    is_whole = low.isdecimal() and (high.isdecimal() or not hyphen)
    if not is_whole or not 1 <= int(low) <= int(high or low):
        raise ValueError(f"counts: got {count!r}, expected a number such as 8 or a range such as 8-12")
    low, high = int(low), int(high or low)
    settings = {"min_experts_per_tok": low, "num_experts_per_tok": high, "target_experts_per_tok": (low + high) / 2}
    return settings


def variant_recipe(recipe: PretrainRecipe, count: str, seed: int) -> PretrainRecipe:
    """Return the recipe with its seed and number of experts replaced."""
    return dataclasses.replace(recipe, seed=seed, model={**recipe.model, **parse_count(count)})


def check_options(args: argparse.Namespace, recipe: PretrainRecipe) -> None:
    """Raise a one-line ValueError at what would else stop the command after hours.

    Args:
        args: The command's options.
        recipe: What the variants are made of.
    """
    for name in ("seeds", "timing_rounds"):
        if getattr(args, name) < 1:
            raise ValueError(f"{name}: got {getattr(args, name)}, expected at least 1")
    for count in args.counts:
        if args.counts.count(count) > 1:
            raise ValueError(f"counts: got {count!r} {args.counts.count(count)} times, expected each once")
        model_config(variant_recipe(recipe, count, seed=0), vocab_size=recipe.vocab_size)


def train_variant(recipe: PretrainRecipe, folder: Path, *, overwrite: bool = False) -> RunFolder:
    """Return the run of these settings, trained now unless the folder holds it finished.

    Args:
        recipe: The settings.
        folder: Its run folder.
        overwrite: Delete a run with other settings.

    Raises:
        FileExistsError: The folder holds another run.
    """
    run = RunFolder(folder)
    if not (run.is_finished and run.settings == recipe_settings(recipe)):
        pretrain(recipe, folder, overwrite=overwrite)
    return run


def measure_variant(run: RunFolder, recipe: PretrainRecipe) -> dict[str, float]:
    """Return what the table needs of one run: bits per byte, experts in training and on held-out text, imbalance.

    Args:
        run: A finished run.
        recipe: Its settings.
    """
    rows = [row for row in run.metrics if "mean_experts_per_tok" in row]
    late = rows[len(rows) // 2 :]
    model = AutoModelForCausalLM.from_pretrained(run.model_path, experts_implementation=recipe.experts_implementation)
    used = held_out_experts(model, held_out_blocks(run, recipe))
    on_held_out = used.double().mean().item()
    return {
        "bits_per_byte": run.summary.results[0].value,
        "bigram_bits_per_byte": run.summary.results[0].baseline,
        "mean_experts_in_training": sum(row["mean_experts_per_tok"] for row in late) / len(late),
        "mean_experts": on_held_out,
        "load_imbalance": sum(row["load_imbalance"] for row in late) / len(late),
        "active_parameters": count_parameters(model.config, on_held_out).active,
        **{
            f"share_of_tokens_with_{count}_experts": (used == count).double().mean().item()
            for count in range(model.config.min_experts_per_tok, model.config.num_experts_per_tok + 1)
        },
    }


def held_out_blocks(run: RunFolder, recipe: PretrainRecipe) -> torch.Tensor:
    """Return the recipe's held-out text as blocks `[N, S]`."""
    texts = cut_to_share(load_texts(recipe.data, "validation", column=recipe.data_column), recipe.eval_bytes)
    return PackedDataset(encode_documents(texts, load_tokenizer(str(run.model_path))), recipe.sequence_length).blocks


@torch.no_grad()
def held_out_experts(model: torch.nn.Module, blocks: torch.Tensor) -> torch.Tensor:
    """Return how many experts each token used in each layer, flat.

    Args:
        model: With our routers.
        blocks: `[N, S]` tokens, without padding.
    """
    used = []
    handles = [
        layer.router.register_forward_hook(lambda _module, _args, output: used.append((output[1] != 0).sum(-1)))
        for layer in find_moe_layers(model)
    ]
    for batch in blocks.split(16):
        model.eval()(input_ids=batch.long(), use_cache=False)
    for handle in handles:
        handle.remove()
    return torch.cat(used)


def summarize(measured: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, Any]]:
    """Return each variant's means with standard errors over seeds, and its paired difference from the first.

    Args:
        measured: By variant, one dict a seed, seeds in the same order.
    """
    first = next(iter(measured.values()))
    table = {}
    for count, rows in measured.items():
        differences = [row["bits_per_byte"] - base["bits_per_byte"] for row, base in zip(rows, first, strict=True)]
        table[count] = {name: mean_with_error([row[name] for row in rows]) for name in rows[0]}
        table[count]["difference"] = mean_with_error(differences)
        table[count]["differences"] = differences
    return table


def format_table(table: dict[str, dict[str, Any]]) -> str:
    """Return the table as Markdown."""
    first = next(iter(table))
    num_seeds = len(table[first]["differences"])
    seeds = f"its {num_seeds} seeds" if num_seeds > 1 else "its seed"
    lines = [
        f"| experts per token | mean k, held-out | bits per byte | against {first}, paired | {seeds} | "
        "active parameters | step time |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for count, row in table.items():
        change = "" if count == first else _with_error(row["difference"], "+.4f")
        by_seed = "" if count == first else ", ".join(f"{difference:+.4f}" for difference in row["differences"])
        lines.append(
            f"| {count} | {_with_error(row['mean_experts'], '.2f')} | {_with_error(row['bits_per_byte'], '.4f')} | "
            f"{change} | {by_seed} | "
            f"{row['active_parameters'][0] / 1e3:.0f} k | {row['relative_step_time']:.2f} |"
        )
    return "\n".join(lines)


def _with_error(pair: tuple[float, float | None], spec: str) -> str:
    """A mean with its error, which one seed does not have."""
    value, error = pair
    return format(value, spec) if error is None else f"{value:{spec}} ± {error:{spec.lstrip('+')}}"


def time_variants(runs: dict[str, RunFolder], recipe: PretrainRecipe, num_rounds: int) -> dict[str, float]:
    """Return each variant's training step time relative to the first's, on the trained models in turn.

    Args:
        runs: By variant, a finished run.
        recipe: Their shared settings.
        num_rounds: Steps of each; the median counts.
    """
    models = {
        count: AutoModelForCausalLM.from_pretrained(
            run.model_path,
            experts_implementation=recipe.experts_implementation,
            router_bias_update_speed=recipe.model.get("router_bias_update_speed", 0.0),
        )
        for count, run in runs.items()
    }
    blocks = held_out_blocks(next(iter(runs.values())), recipe)
    medians = median_step_times(models, blocks[: recipe.batch_size].long(), num_rounds)
    first = next(iter(medians.values()))
    return {count: seconds / first for count, seconds in medians.items()}


def run(args: argparse.Namespace) -> int:
    """Train what is missing, print the table and write it as JSON into the output folder.

    Args:
        args: The options of ``deepseek-moe bench experts``.

    Raises:
        ValueError: An option or a setting that cannot work, before anything is trained.
    """
    recipe, output = load_recipe(args.recipe, PretrainRecipe), Path(args.output)
    check_options(args, recipe)
    measured: dict[str, list[dict[str, float]]] = {count: [] for count in args.counts}
    runs: dict[str, RunFolder] = {}
    for seed in range(args.seeds):
        for count in args.counts:
            variant = variant_recipe(recipe, count, seed)
            trained = train_variant(variant, output / f"{count}-seed{seed}", overwrite=args.overwrite)
            runs.setdefault(count, trained)
            measured[count].append(measure_variant(trained, variant))
            print(json.dumps({"experts": count, "seed": seed, **measured[count][-1]}), flush=True)
    table = summarize(measured)
    for count, ratio in time_variants(runs, recipe, args.timing_rounds).items():
        table[count]["relative_step_time"] = ratio
    print(format_table(table))
    write_over_runs(output, "experts", {"table": table, "runs": measured}, format_table(table))
    return 0
