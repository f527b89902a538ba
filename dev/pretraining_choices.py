"""Trains `pretrain-demo` with one choice changed at a time, and dense Llamas, each for equal CPU time.

    OMP_NUM_THREADS=1 python dev/pretraining_choices.py RUNS [--steps 160] [--seeds 3] [--only NAME...]

A step of each variant is timed first, in turn with one of the recipe as it is; a variant gets as many fewer steps as
its step costs more, and the schedule ends with its last step. A Llama has as many active parameters, the width, the
depth and the vocabulary of the variant that it stands against, and is trained by the same optimizer, on the same
blocks of books; it goes through `adapt`, from drawn weights. The optimizer itself is compared by
`muon_against_adamw.py`. Finished runs are taken as they are.
"""

import argparse
import dataclasses
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from muon_against_adamw import CpuClock, timed_step, train
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.trainer import DEFAULT_CALLBACKS

from deepseek_records.loading import load_model, load_tokenizer
from deepseek_records.run_folder import RunFolder
from deepseek_records.statistics import mean_with_error
from deepseek_training.recipes.loading import load_recipe
from deepseek_training.stages.adapt import AdaptRecipe, adapt
from deepseek_training.stages.pretrain import PretrainRecipe
from deepseek_training.trainer.muon import build_muon
from modeling_deepseek import DeepseekConfig, DeepseekForCausalLM
from modeling_deepseek.parameter_count import count_parameters

# Twice as many experts of half the width, and twice as many of them used.
FINER = {
    **{"n_routed_experts": 32, "moe_intermediate_size": 48, "min_experts_per_tok": 4, "num_experts_per_tok": 8},
    "target_experts_per_tok": 6.0,
}
WIDE: dict[str, Any] = {"vocab_size": 2048, "model": {"num_hidden_layers": 2, "hidden_size": 160}}
# Choice, variant, settings that differ from the recipe's; those under `model` are added to it.
VARIANTS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("", "as it is", {}),
    ("depth and width", "2 layers of 160", {"model": {"num_hidden_layers": 2, "hidden_size": 160}}),
    ("depth and width", "5 layers of 96", {"model": {"num_hidden_layers": 5, "hidden_size": 96}}),
    ("experts", "32 of half the width, 4 to 8 used", {"model": FINER}),
    ("batch", "4 blocks", {"batch_size": 4}),
    ("rate", "0.018", {"learning_rate": 1.8e-2}),
    ("vocabulary", "2048 tokens", {"vocab_size": 2048}),
    ("both", "2048 tokens and 2 layers of 160", WIDE),
)
# Llama, the variant whose active size, width, depth and vocabulary it has.
LLAMAS = {
    "dense Llama": "as it is",
    "dense Llama of 2048 tokens and 2 layers of 160": "2048 tokens and 2 layers of 160",
}
SETTINGS = {name: settings for _, name, settings in VARIANTS} | {
    name: next(settings for _, other, settings in VARIANTS if other == like) for name, like in LLAMAS.items()
}
FOLDERS = {name: str(place) for place, (_, name, _) in enumerate(VARIANTS)} | dict(
    zip(LLAMAS, ("llama", "llama-wide"), strict=True)
)


def recipe_of(recipe: PretrainRecipe, settings: dict[str, Any]) -> PretrainRecipe:
    """Return the recipe with a variant's settings."""
    return dataclasses.replace(recipe, **{**settings, "model": {**recipe.model, **settings.get("model", {})}})


def our_config(recipe: PretrainRecipe) -> DeepseekConfig:
    """Return the configuration that a recipe trains."""
    return DeepseekConfig.from_preset(recipe.preset, vocab_size=recipe.vocab_size, **recipe.model)


def llama_config(recipe: PretrainRecipe) -> LlamaConfig:
    """Return a Llama of the recipe's width and depth with as many active parameters: its MLP makes up for the rest."""
    ours = our_config(recipe)
    wanted = count_parameters(ours, ours.target_experts_per_tok).active
    sizes = {"hidden_size": ours.hidden_size, "num_hidden_layers": ours.num_hidden_layers}
    heads = {"num_attention_heads": ours.num_attention_heads, "num_key_value_heads": ours.num_attention_heads}
    tokens = {"vocab_size": recipe.vocab_size, "tie_word_embeddings": True, "max_position_embeddings": 1024}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    one, two = (
        LlamaForCausalLM(LlamaConfig(intermediate_size=width, **sizes, **heads, **tokens, **special)).num_parameters()
        for width in (8, 16)
    )
    width = max(8, 8 + round((wanted - one) / (two - one)) * 8)
    return LlamaConfig(intermediate_size=width, **sizes, **heads, **tokens, **special)


class Stepper:
    """A model of a variant that takes steps on random tokens.

    Args:
        recipe: The variant's.
        is_llama: Whether it is the Llama.
    """

    def __init__(self, recipe: PretrainRecipe, *, is_llama: bool) -> None:
        torch.manual_seed(0)
        self.recipe = recipe
        self.model = LlamaForCausalLM(llama_config(recipe)) if is_llama else DeepseekForCausalLM(our_config(recipe))
        if not is_llama:
            self.model.set_experts_implementation(recipe.experts_implementation)
        self.model.train()
        rates = {"lr": 1e-4, "weight_decay": recipe.weight_decay, "betas": (0.9, recipe.adam_beta2)}
        is_muon = recipe.optimizer == "muon"
        make = build_muon if is_muon else torch.optim.AdamW
        self.optimizer = make(self.model if is_muon else self.model.parameters(), **rates)

    def step(self) -> float:
        """Return the CPU seconds of a step."""
        recipe = self.recipe
        ids = torch.randint(0, recipe.vocab_size, (recipe.batch_size, recipe.sequence_length))
        return timed_step(self.model, self.optimizer, ids, recipe.max_grad_norm)


def step_costs(recipe: PretrainRecipe, names: list[str], num_rounds: int) -> dict[str, float]:
    """Return what a step of each variant costs in steps of the recipe as it is.

    Args:
        recipe: The settings.
        names: Of variants and Llamas; the recipe as it is first.
        num_rounds: Steps of each.
    """
    steppers = {name: Stepper(recipe_of(recipe, SETTINGS[name]), is_llama=name in LLAMAS) for name in names}
    times: dict[str, list[float]] = {name: [] for name in steppers}
    for number in range(num_rounds + 2):
        for name, stepper in steppers.items():
            seconds = stepper.step()
            if number >= 2:
                times[name].append(seconds)
    first = statistics.median(times[names[0]])
    return {name: statistics.median(row) / first for name, row in times.items()}


def train_llama(recipe: PretrainRecipe, folder: Path, tokenizer: Path, max_steps: int) -> dict[str, float]:
    """Return bits per byte and CPU seconds of a Llama.

    Args:
        recipe: The settings.
        folder: Of the run.
        tokenizer: A run's model, whose tokenizer it gets.
        max_steps: Steps.
    """
    start, seed = folder.with_name(f"start-{folder.name}"), recipe.seed
    clock = folder / "cpu_seconds.json"
    if not clock.exists():
        torch.manual_seed(seed)
        LlamaForCausalLM(llama_config(recipe)).save_pretrained(start)
        load_tokenizer(str(tokenizer)).save_pretrained(start)
        same = ("sequence_length", "batch_size", "optimizer", "learning_rate", "warmup_steps", "eval_bytes")
        settings = {name: getattr(recipe, name) for name in same}
        data = {"data": recipe.data, "general_data": "medicine", "replay_share": 0.0}
        own = AdaptRecipe(model=str(start), max_steps=max_steps, seed=seed, report_to=[], **data, **settings)
        adapt(own, folder, overwrite=True)
        clock.write_text(json.dumps(CpuClock.seconds))
    rows = RunFolder(folder).summary.results
    bits = next(row.value for row in rows if row.dataset == recipe.data and row.when == "after")
    return {"bits_per_byte": bits, "cpu_seconds": json.loads(clock.read_text())}


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", type=Path, help="folder of the trainings")
    parser.add_argument("--recipe", default="pretrain-demo")
    parser.add_argument("--steps", type=int, default=160, help="of the recipe as it is")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=15, help="steps of each that are timed")
    parser.add_argument("--only", nargs="+", choices=[*SETTINGS], help="beside the recipe as it is; otherwise all")
    args = parser.parse_args()
    names = [name for name in SETTINGS if not args.only or name in (VARIANTS[0][1], *args.only)]
    for name in names:
        if name in LLAMAS and LLAMAS[name] not in names:
            parser.error(f"--only: got {name!r}, expected {LLAMAS[name]!r} beside it, whose tokenizer it has")
    torch.set_num_threads(1)
    DEFAULT_CALLBACKS.append(CpuClock)
    recipe = load_recipe(args.recipe, PretrainRecipe)
    recipe = dataclasses.replace(recipe, sample_prompts=[], check_bigram=False)
    costs_file = args.runs / "step_costs.json"
    costs = json.loads(costs_file.read_text()) if costs_file.exists() else {}
    if missing := [name for name in names[1:] if name not in costs]:
        args.runs.mkdir(parents=True, exist_ok=True)
        costs |= step_costs(recipe, [names[0], *missing], args.rounds)
        costs_file.write_text(json.dumps(costs))
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for seed in range(args.seeds):
        for name in names:
            steps = round(args.steps / costs[name])
            changed = recipe_of(recipe, {"seed": seed, "warmup_steps": min(30, steps // 5), **SETTINGS[name]})
            folder = args.runs / f"{FOLDERS[name]}-{seed}"
            if name in LLAMAS:
                tokenizer = args.runs / f"{FOLDERS[LLAMAS[name]]}-{seed}" / "model"
                found[name].append(train_llama(changed, folder, tokenizer, steps))
            else:
                found[name].append(train(changed, folder, max_steps=steps))
            print(json.dumps({"variant": name, "seed": seed, "steps": steps, **found[name][-1]}), flush=True)
    print_table(args, found, costs)
    return 0


def print_table(args: argparse.Namespace, found: dict[str, list[dict[str, float]]], costs: dict[str, float]) -> None:
    """Print what each variant reached, and what it reached less what its Llama did.

    Args:
        args: The options.
        found: By variant, one row for each seed.
        costs: Of a step of each.
    """
    print("| choice | variant | parameters | active | steps | CPU s | bits per byte | against the recipe, paired |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    choices = {name: choice for choice, name, _ in VARIANTS}
    for name in found:
        model = load_model(args.runs / f"{FOLDERS[name]}-0" / "model")
        total = active = sum(one.numel() for one in model.parameters())
        if name not in LLAMAS:
            active = count_parameters(model.config, model.config.target_experts_per_tok).active
        bits = [row["bits_per_byte"] for row in found[name]]
        cpu = statistics.mean(row["cpu_seconds"] for row in found[name])
        against = "" if name == VARIANTS[0][1] else paired(found, name, VARIANTS[0][1])
        value, error = mean_with_error(bits)
        cells = [
            choices.get(name, ""),
            name,
            f"{total / 1e3:,.0f} k",
            f"{active / 1e3:,.0f} k",
            str(round(args.steps / costs[name])),
        ]
        print(f"| {' | '.join([*cells, f'{cpu:.0f}', f'{value:.3f} ± {error or 0:.3f}', against])} |")
    for llama, name in LLAMAS.items():
        if llama in found:
            print(f"{name}, less {llama}: {paired(found, name, llama)}")


def paired(found: dict[str, list[dict[str, float]]], name: str, base: str) -> str:
    """Return the mean difference of two variants over seeds with its error.

    Args:
        found: By variant, one row for each seed.
        name: A variant.
        base: The one that is taken from it.
    """
    rows = zip(found[name], found[base], strict=True)
    mean, error = mean_with_error([one["bits_per_byte"] - other["bits_per_byte"] for one, other in rows])
    return f"{mean:+.3f} ± {error or 0:.3f}"


if __name__ == "__main__":
    sys.exit(main())
