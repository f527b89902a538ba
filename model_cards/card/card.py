"""The model card, written from run folders alone.

`write_card` gathers what the stages left behind, fills the template through `huggingface_hub.ModelCard` and writes
``README.md``, the picture of the block and ``.eval_results/`` beside it. The text is in ``templates/model_card.md``,
which a user can replace; this file only prepares the values. Surprising: nothing is typed in by hand, so what no stage
measured appears under "Not measured", never as a blank or a guess.
"""

import re
from pathlib import Path
from typing import Any

from deepseek_model_cards.benchmarks import benchmark_of, chance_level, compare_to_chance
from deepseek_model_cards.card.block_picture import describe_block, draw_block
from deepseek_model_cards.card.metadata import (
    Measured,
    build_metadata,
    read_config,
    results_of_final_model,
    write_eval_results,
)
from deepseek_model_cards.card.parameter_table import ParameterTable, count_checkpoint
from deepseek_model_cards.stage_rows import data_row, energy_estimate, stage_row, total_seconds
from deepseek_model_cards.summary_table import pair_results
from deepseek_model_cards.wording import (
    format_count,
    format_seconds,
    format_value,
    label_dataset,
    label_metric,
)
from deepseek_records.stages import Stage, final_model_path, merged_versions, read_stages
from deepseek_records.summary import Result

TEMPLATE = Path(__file__).parent / "templates" / "model_card.md"
PICTURE = "block.png"
# What a full card would hold, and how a result that measures it reads as "metric data set".
MEASUREMENTS = (
    ("knowledge: MMLU", r"mmlu"),
    ("code: HumanEval", r"humaneval"),
    ("language modelling on held-out text (bits per byte, perplexity)", r"bits_per_byte|perplexity|loss"),
    ("reward on held-out prompts", r"reward"),
    ("social bias (CrowS-Pairs, WinoBias, BBQ and the like)", r"crows|winobias|bbq|stereoset|\bbias"),
    ("refusals of harmful and of harmless requests (AdvBench, XSTest)", r"refusal"),
    ("harmful completions judged by an independent classifier", r"harmful_completions|toxicity"),
    ("robustness to typing errors, option order, distraction and wording", r"perturbed"),
    ("accuracy from common to rare terms (long tail)", r"term frequency"),
    ("robustness to adversarial prompts", r"adversarial|jailbreak|attack"),
    ("calibration of its probabilities", r"calibration|\bece\b"),
    ("reasoning and mathematics (GSM8K and the like)", r"gsm8k|math"),
    ("long contexts", r"long_context|needle|ruler"),
    ("languages other than the training data's", r"multilingual|flores"),
    ("overlap of the training data with the benchmarks", r"contamination|overlap"),
)
_SAFETY = re.compile(
    r"safety|bias|crows|bbq|toxicity|refusal|harm|jailbreak|adversarial|perturbed|term frequency", re.IGNORECASE
)
SMALL_MODEL = 1_000_000_000


def write_card(
    run_path: str | Path,
    *,
    name: str | None = None,
    licence: str = "apache-2.0",
    repo_id: str | None = None,
    template: str | Path | None = None,
    output: str | Path | None = None,
    model_path: Path | None = None,
) -> Path:
    """Write the model card of a run and return its path.

    Args:
        run_path: A stage's folder, or the parent of several.
        name: The model's name; the folder's name by default.
        licence: The licence of the weights, as the Hub spells it.
        repo_id: Where the model will lie on the Hub, for the loading examples.
        template: A Jinja template in place of ours; it gets the same values.
        output: The folder for ``README.md``, ``block.png`` and ``.eval_results/``; the run's own by default.
        model_path: The model's folder where it is not in the run; the last stage's by default.

    Raises:
        FileNotFoundError: There is no finished run, or no such template.
        ValueError: Metadata that the Hub would refuse, or a template that is none.
    """
    from huggingface_hub import ModelCard
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo_id or "some/name")
    except HFValidationError:
        raise ValueError(f"repo_id: {repo_id!r} is no Hub id; pass user/name") from None
    path = Path(run_path)
    target = Path(output) if output else path
    stages = read_stages(path)
    model_path = model_path or final_model_path(stages)
    config = read_config(model_path)
    name = name or _name_from(path, repo_id)
    metadata = build_metadata(stages, name=name, licence=licence, config=config)
    values = describe_run(stages, name=name, repo_id=repo_id, config=config, model_path=model_path)
    if template is not None:
        check_template(Path(template), known=set(values) | set(metadata.to_dict()))
    if values["architecture"]:
        draw_block(config, target / PICTURE)
    # from_template fills {{ card_data }} itself and gives the template every metadata field; ours come on top.
    card = ModelCard.from_template(metadata, template_path=str(template or TEMPLATE), **values)
    card.save(target / "README.md")
    write_eval_results(stages, target)
    return target / "README.md"


def check_template(path: Path, known: set[str]) -> None:
    """Refuse a template with a fault in it, an unknown variable, or no place for the metadata.

    Args:
        path: The template.
        known: The variables that it may use, beside ``card_data``.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is faulty; jinja would leave an unknown variable blank without a word.
    """
    from jinja2 import Environment, TemplateSyntaxError, meta

    if not path.is_file():
        raise FileNotFoundError(f"--template: {path} is no file")
    try:
        used = meta.find_undeclared_variables(Environment().parse(path.read_text(encoding="utf-8")))
    except (TemplateSyntaxError, UnicodeDecodeError) as error:
        line = f", line {error.lineno}" if isinstance(error, TemplateSyntaxError) else ""
        raise ValueError(f"--template: {path}{line}: {error}") from None
    if unknown := sorted(used - known - {"card_data"}):
        raise ValueError(f"--template: {path} uses {unknown[0]!r}, which is none of {', '.join(sorted(known))}")
    if "card_data" not in used:
        raise ValueError(f"--template: {path} has no '{{{{ card_data }}}}' between two lines of ---")


def _name_from(path: Path, repo_id: str | None) -> str:
    return repo_id.split("/")[-1] if repo_id else f"deepseek-moe-{path.resolve().name}"


def describe_run(
    stages: dict[str, Stage], *, name: str, repo_id: str | None, config: dict[str, Any], model_path: Path | None
) -> dict[str, Any]:
    """Return the values that the template is filled with.

    Args:
        stages: What `read_stages` gave.
        name: The model's name.
        repo_id: Where it will lie on the Hub, or None.
        config: Its ``config.json``.
        model_path: Its folder, or None.
    """
    is_moe = "n_routed_experts" in config
    table = count_checkpoint(model_path) if is_moe else None
    finals = results_of_final_model(stages)
    benchmarks = [found for found in finals if benchmark_of(found.result)]
    return {
        "name": name,
        "introduction": _introduction(stages, table),
        "picture": PICTURE if is_moe else None,
        "architecture": _architecture(config, table) if is_moe else [],
        "parameters": _parameters(config, table) if is_moe else None,
        "data": [data_row(stage, row) for stage in stages.values() for row in stage.data],
        "stages": [stage_row(stage) for stage in stages.values()],
        "total_time": format_seconds(total_seconds(stages)),
        "energy": energy_estimate(stages),
        "benchmarks": [_benchmark_row(found.result) for found in benchmarks],
        "benchmark_commands": sorted({_how_measured(found.result, found.stage) for found in benchmarks}),
        "safety": [row for stage in stages.values() for row in pair_results(_safety_results(stage))],
        "safety_notes": sorted(
            {
                f"{label_dataset(row)}: {row.does_not_show}"
                for stage in stages.values()
                for row in _safety_results(stage)
                if row.does_not_show
            }
        ),
        "limits": _limits(table, finals),
        "not_measured": _not_measured(stages),
        "loading": _loading(repo_id or f"<user>/{name}", config),
        "versions": ", ".join(f"{key} {value}" for key, value in merged_versions(stages).items()),
        "citation": _citation(name),
    }


def _safety_results(stage: Stage) -> list[Result]:
    return [row for row in stage.results if _SAFETY.search(f"{row.metric} {row.dataset}")]


def _introduction(stages: dict[str, Stage], table: ParameterTable | None) -> str:
    size = (
        f"A DeepSeek-style Mixture-of-Experts language model with {format_count(table.total)} parameters, of which "
        f"{format_count(table.active)} work on a token"
        if table
        else "A language model"
    )
    done = {
        "pretrain": "pretrained from scratch",
        "adapt": "adapted to a domain by continued pretraining",
        "sft": "taught to answer by supervised fine-tuning",
        "align": "aligned by PPO under a weighted reward",
    }
    steps = [text for key, text in done.items() if key in stages and stages[key].is_finished]
    story = f"; {', then '.join(steps)}" if steps else ""
    return f"{size}{story}. Made with deepseek-moe."


def _architecture(config: dict[str, Any], table: ParameterTable) -> list[tuple[str, str]]:
    words = describe_block(config)
    is_dynamic = (config.get("min_experts_per_tok") or config["num_experts_per_tok"]) < config["num_experts_per_tok"]
    target = config.get("target_experts_per_tok")
    cache = config["kv_lora_rank"] + config["qk_rope_head_dim"]
    return [
        ("layers", f"{config['num_hidden_layers']}; {words['dense']}"),
        ("hidden size", f"{config['hidden_size']:,}"),
        ("attention", f"latent (MLA), {words['heads']}; a token's cache is {cache:,} numbers a layer"),
        ("experts", f"{words['routed']}; {words['active']} work on a token; {words['shared']}"),
        ("router", f"{words['gate']}, {words['second']}, {words['third']}".replace("\n", " ")),
        ("norm", words["norm"]),
        *([("experts a token, target mean", f"{target:g}")] if is_dynamic and target else []),
        ("vocabulary", f"{config['vocab_size']:,} tokens"),
        ("context", f"{config['max_position_embeddings']:,} tokens"),
        ("stored as", ", ".join(table.dtypes)),
    ]


def _parameters(config: dict[str, Any], table: ParameterTable) -> dict[str, Any]:
    most = config["num_experts_per_tok"]
    rows = [
        {"part": part, "count": f"{count:,}", "share": f"{count / table.total:.1%}"}
        for part, count in table.by_part.items()
    ]
    return {
        "rows": rows,
        "total": f"{table.total:,}",
        "active": f"{table.active:,}",
        "active_share": f"{table.active / table.total:.1%}",
        "note": f"Active: everything but the routed experts a token is not sent to, at {most} of "
        f"{config['n_routed_experts']} (the most the router may choose).",
    }


def _benchmark_row(row: Result) -> dict[str, str]:
    chance = chance_level(row)
    return {
        "dataset": label_dataset(row),
        "metric": label_metric(row.metric),
        "value": format_value(row.value, row.stderr),
        "n": format_value(row.n),
        "shots": format_value(row.num_fewshot),
        "chance": format_value(chance),
        "reading": compare_to_chance(row, chance),
    }


def _how_measured(row: Result, stage: Stage) -> str:
    version = stage.environment.versions.get("deepseek-moe", "(version not recorded)")
    harness = row.harness or f"deepseek-moe {version}"
    command = row.command or stage.command_line or "not recorded"
    return f"{label_dataset(row)}: {harness}, `{command}`"


def _limits(table: ParameterTable | None, finals: list[Measured]) -> list[str]:
    lines = []
    if table and table.total < SMALL_MODEL:
        lines.append(
            f"A model of this size ({format_count(table.total)} parameters) is at chance on MMLU and HumanEval; its "
            "figures there show that the measurement works, not that the model knows anything."
        )
    for row in (found.result for found in finals):
        reading = compare_to_chance(row, chance_level(row))
        if reading.startswith(("at chance", "below chance", "none solved")):
            lines.append(f"{label_dataset(row)}: {format_value(row.value, row.stderr)}, {reading}.")
    lines += [
        "It states falsehoods fluently. Out of scope: medical, legal or financial advice, decisions about people, and "
        "any use where a wrong sentence does harm, whatever domain it was adapted to.",
        "It repeats the biases of its training data, listed above; what was checked of them is under bias and safety.",
        "The reward that it was aligned with scores relevance, safety and diversity by small automatic measures. A "
        "higher reward is not proof of a better or a safer answer.",
    ]
    return lines


def _not_measured(stages: dict[str, Stage]) -> list[str]:
    measured = " ".join(f"{row.metric} {row.dataset}" for stage in stages.values() for row in stage.results)
    missing = [text for text, pattern in MEASUREMENTS if not re.search(pattern, measured, re.IGNORECASE)]
    return [*missing, "energy by a meter (the figure above is an estimate)"]


def _loading(repo_id: str, config: dict[str, Any]) -> list[dict[str, str]]:
    tail = 'inputs = tokenizer("Once upon a time", return_tensors="pt")\n'
    tail += "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0], skip_special_tokens=True))"
    load = "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
    token = f'tokenizer = AutoTokenizer.from_pretrained("{repo_id}")\n'
    package = "import modeling_deepseek  # installed with deepseek-moe; registers the architecture\n" + load + token
    ways = [
        {
            "title": "With the package",
            "language": "python",
            "code": f'{package}model = AutoModelForCausalLM.from_pretrained("{repo_id}")\n{tail}',
        }
    ]
    if config.get("auto_map"):
        # The tokenizer asks too: it reads the configuration, whose class is remote code.
        trust = f'from_pretrained("{repo_id}", trust_remote_code=True)'
        code = f"{load}tokenizer = AutoTokenizer.{trust}\nmodel = AutoModelForCausalLM.{trust}\n{tail}"
        ways.append({"title": "Without it, by the code in this repository", "language": "python", "code": code})
    exported = f"hf download {repo_id} --local-dir model\ndeepseek-moe export model exported --to deepseek_v3\n"
    exported += (
        "# any engine that reads DeepSeek-V3 then loads `exported`, without this package and without remote code"
    )
    ways.append({"title": "Exported to the plain DeepSeek-V3 format", "language": "bash", "code": exported})
    return ways


def _citation(name: str) -> str:
    key = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
    return (
        f"@misc{{{key},\n  title = {{{name}}},\n  note = {{Trained with deepseek-moe; architecture after DeepSeek-AI, "
        "DeepSeek-V3 Technical Report, arXiv:2412.19437}\n}"
    )
