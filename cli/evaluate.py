"""``deepseek-moe evaluate``: scores any causal language model; the work is done by `deepseek_eval.harness`."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deepseek_eval.tasks.catalogue import TASKS, find_task
from deepseek_model_cards.benchmarks import score_interval
from deepseek_records.run_folder import RunFolder
from deepseek_records.summary import Result

HELP = "Score a causal language model: knowledge, code, bias, robustness, refusals, images and sounds."
EXAMPLES = """
  deepseek-moe evaluate runs/demo/align --tasks mmlu,humaneval --max-new-tokens 256 --dry-run
  deepseek-moe evaluate runs/demo/align --tasks mmlu --limit 2
  deepseek-moe evaluate path/to/model --tasks mmlu --num-fewshot 5 --batch-size 64 --output runs/mmlu
  deepseek-moe evaluate runs/demo/align --tasks mmlu --limit 1 --apply-chat-template --output runs/chat
  deepseek-moe evaluate --samples completions.jsonl --tasks humaneval --output runs/scored
  deepseek-moe evaluate path/to/model --tasks mmlu,long_tail,winobias,bbq,refusal --limit 20 --output runs/held
  deepseek-moe evaluate path/to/model --tasks crows_pairs --data crows_pairs=path/to/crows_pairs_anonymized.csv
  deepseek-moe evaluate runs/demo/adapt --tasks bits_per_byte --data my_texts --output runs/my_texts
  deepseek-moe evaluate runs/multimodal --tasks digits,shapes,tones --output runs/seen
  deepseek-moe evaluate runs/demo/sft runs/demo/align --tasks mmlu --limit 1 --output runs/both
  deepseek-moe evaluate http://127.0.0.1:8000 --tasks humaneval --limit 20 --max-new-tokens 256 --output runs/served
  deepseek-moe evaluate http://127.0.0.1:8000 --tokenizer runs/demo/align --tasks bbq --limit 9 --output runs/bbq
  deepseek-moe evaluate --compare runs/before runs/after
  deepseek-moe evaluate --table runs/seed-0 runs/seed-1 runs/other
  deepseek-moe evaluate org/name --tasks humaneval --num-samples 10 --temperature 0.8 --output runs/humaneval
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's options.

    Args:
        parser: The command's parser.
    """
    parser.add_argument(
        "models",
        metavar="MODEL",
        nargs="*",
        help="checkpoint folder, run folder, Hub id, or the address of a server with OpenAI's protocol; "
        "of several models, each gets a run folder below --output",
    )
    parser.add_argument(
        "--samples", default=None, metavar="FILE", help="instead of a model: completions to run (task_id, completion)"
    )
    parser.add_argument(
        "--compare",
        nargs=2,
        default=None,
        metavar="RUN",
        help="instead of a model: a paired test of two finished runs on the items both answered",
    )
    parser.add_argument(
        "--table",
        nargs="+",
        default=None,
        metavar="RUN",
        help="instead of a model: finished runs of any stage side by side, with intervals and what differs",
    )
    parser.add_argument(
        "--tasks", default="mmlu,humaneval", metavar="NAMES", help=f"comma-separated, of {', '.join(sorted(TASKS))}"
    )
    parser.add_argument(
        "--num-fewshot",
        type=int,
        default=None,
        metavar="N",
        help="shots (MMLU: 0 to 5, 0 by default; MBPP: 0 to 3, 3)",
    )
    parser.add_argument(
        "--limit",
        default=None,
        metavar="N",
        help="first N items of a task (of each subject, category or type where it has them), or by task: "
        "mmlu=2,humaneval=20 (all without it)",
    )
    parser.add_argument("--batch-size", type=int, default=32, metavar="B", help="questions or prompts at once")
    parser.add_argument("--output", default="runs/evaluate", metavar="DIR", help="run folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace a run that is in the way")
    parser.add_argument(
        "--data",
        default=None,
        metavar="PATH",
        help="folder with own data files, named as the embedded, or by task a folder, file or Hub id: "
        "crows_pairs=crows_pairs_anonymized.csv,bbq=owner/name; for bits_per_byte the text, a file or folder",
    )
    parser.add_argument(
        "--tokenizer",
        default=None,
        metavar="MODEL",
        help="of a server's model: its folder or Hub id, for tasks that compare given words",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check everything, print what would be asked, what it needs and how long it takes, and write nothing",
    )
    _add_generation_arguments(parser)
    _add_model_arguments(parser)


def _add_generation_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("prompts and completions")
    group.add_argument(
        "--max-length", type=int, default=None, metavar="N", help="tokens that the model sees at once (its context)"
    )
    group.add_argument("--max-new-tokens", type=int, default=None, metavar="N", help="length limit (HumanEval: 1024)")
    group.add_argument("--num-samples", type=int, default=1, metavar="N", help="completions per problem")
    group.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy")
    group.add_argument("--top-p", type=float, default=1.0, metavar="P", help="nucleus share for sampling")
    group.add_argument(
        "--prompt-style", default="base", choices=("base", "chat"), help="raw text, or the tokenizer's chat template"
    )
    group.add_argument(
        "--apply-chat-template",
        "--apply_chat_template",
        dest="prompt_style",
        action="store_const",
        const="chat",
        default=argparse.SUPPRESS,
        help="the same as --prompt-style chat, as lm-evaluation-harness calls it",
    )
    group.add_argument("--seed", type=int, default=0, help="seed for sampling")
    group.add_argument(
        "--allow-weak-sandbox", action="store_true", help="run programs though the machine cannot confine them fully"
    )


def _add_model_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("loading")
    group.add_argument(
        "--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"), help="weights' type"
    )
    group.add_argument("--device", default=None, help="torch device (the first GPU, else the CPU)")
    group.add_argument("--adapter", default=None, metavar="PATH", help="PEFT adapter, folder or Hub id")
    group.add_argument("--experts-implementation", default=None, metavar="NAME", help="how MoE layers run")
    group.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the checkpoint")


def parse_limit(text: str | None) -> int | dict[str, int] | None:
    """Return ``--limit`` as the harness takes it.

    Args:
        text: A number, or ``task=number`` pairs with commas.

    Raises:
        ValueError: It is neither.
    """
    if text is None:
        return None
    try:
        if "=" not in text:
            return int(text)
        return {name.strip(): int(number) for name, number in (pair.split("=") for pair in text.split(","))}
    except ValueError:
        raise ValueError(
            f"limit: {text!r}, expected a number or task=number pairs such as mmlu=2,humaneval=20"
        ) from None


def parse_data(text: str | None) -> str | dict[str, str] | None:
    """Return ``--data`` as the harness takes it.

    Args:
        text: A folder, or ``task=source`` pairs with commas.

    Raises:
        ValueError: A pair is incomplete.
    """
    if text is None or "=" not in text:
        return text
    pairs = [pair.partition("=") for pair in text.split(",")]
    if not all(name.strip() and source.strip() for name, _, source in pairs):
        raise ValueError(f"data: {text!r}, expected a folder or task=source pairs such as bbq=path/to/bbq")
    return {name.strip(): source.strip() for name, _, source in pairs}


def run(args: argparse.Namespace) -> int:
    """Evaluate, or compare two evaluations, and print one line a figure.

    Args:
        args: The parsed options.

    Returns:
        0.
    """
    limit = parse_limit(args.limit)
    tasks = [name.strip() for name in args.tasks.split(",") if name.strip()]
    if not tasks:
        raise ValueError("--tasks: got no name, expected at least one, for example mmlu,humaneval")
    if sum(source is not None for source in (args.models or None, args.samples, args.compare, args.table)) != 1:
        raise ValueError("evaluate: give one of MODEL, --samples FILE, --compare RUN RUN and --table RUN ...")
    _refuse_unused(args)
    if args.compare:
        from deepseek_eval.comparison import format_comparison

        print(format_comparison(*args.compare))
        return 0
    if args.table:
        from deepseek_cli.run_table import format_table

        print(format_table(args.table))
        return 0
    asked = {find_task(name).name for name in tasks}  # Before the seconds that torch takes to load.
    for option, given in (("limit", limit), ("data", parse_data(args.data))):
        for name in given if isinstance(given, dict) else ():
            if find_task(name).name not in asked:
                raise ValueError(f"{option}: got {name}, expected one of the --tasks ({', '.join(sorted(asked))})")
    from deepseek_eval.served_model import is_endpoint
    from deepseek_model_cards.report.media_page import write_media_page
    from deepseek_model_cards.report.report import write_report

    has_server = any(is_endpoint(model) for model in args.models)
    if has_server and (args.dry_run or len(args.models) > 1):
        raise ValueError("evaluate: got a server with --dry-run or among several models, expected it alone")
    if args.tokenizer is not None and args.models and not has_server:
        raise ValueError(
            "--tokenizer: without effect on a checkpoint, which brings its own; expected it with a server"
        )
    if args.dry_run:
        return _describe(args, tasks, limit)
    if len(args.models) > 1:
        return _evaluate_several(args, tasks, limit)
    results = _score_samples(args, tasks, limit) if args.samples else _evaluate_model(args, tasks, limit)
    print(format_results(results, RunFolder(args.output).summary.results))
    report = write_report(args.output, Path(args.output) / "report.html", with_items=True)
    media = write_media_page(args.output, Path(args.output) / "media.html")
    pages = report.name if media is None else f"{report.name}, {media.name}"
    print(f"\nWritten to {args.output}: results.json, samples_<task>.jsonl and {pages}")
    return 0


def _evaluate_several(args: argparse.Namespace, tasks: list[str], limit: int | dict[str, int] | None) -> int:
    """Score one model after another into folders below the output, and print the joint table."""
    from deepseek_cli.run_table import format_table
    from deepseek_model_cards.report.report import write_report
    from deepseek_records.loading import resolve_checkpoint
    from deepseek_records.output_paths import check_output

    for model in args.models:  # before the first is scored
        resolve_checkpoint(model)
    output = check_output(args.output)
    if (output / "recipe.yaml").exists():
        raise FileExistsError(f"output: {output} holds a run, expected a folder for several; pass another --output")
    folders = [output / name for name in name_models(args.models)]
    for folder in folders:
        if RunFolder(folder).is_finished and not args.overwrite:
            raise FileExistsError(
                f"output: {folder} holds a finished run; pass --overwrite, or only the other models, and set all side "
                "by side with --table"
            )
    for model, folder in zip(args.models, folders, strict=True):
        one = argparse.Namespace(**{**vars(args), "models": [model], "output": str(folder)})
        _evaluate_model(one, tasks, limit)
        write_report(folder, folder / "report.html", with_items=True)
    print(format_table(folders))
    print("\nWritten to each: results.json, samples_<task>.jsonl and report.html")
    return 0


def name_models(models: Sequence[str]) -> list[str]:
    """Return a folder name for each model: the last part of its path, numbered where two would be equal.

    Args:
        models: As the user names them; the ``model`` of a run folder is called by the run.
    """
    names: list[str] = []
    for model in models:
        path = Path(model).expanduser().resolve()
        name = path.parent.name if path.name == "model" and path.parent.name else path.name or "model"
        number = 2
        unique = name
        while unique in names:
            unique, number = f"{name}-{number}", number + 1
        names.append(unique)
    return names


# Options without effect where no model is run, and those that a comparison has no use for either.
_OF_MODELS = [
    *(
        "num_fewshot",
        "batch_size",
        "max_length",
        "max_new_tokens",
        "num_samples",
        "temperature",
        "top_p",
        "prompt_style",
        "seed",
    ),
    *("dtype", "device", "adapter", "experts_implementation", "trust_remote_code", "dry_run", "tokenizer"),
]
_OF_RUNS = ["tasks", "limit", "data", "output", "overwrite", "allow_weak_sandbox"]


def _refuse_unused(args: argparse.Namespace) -> None:
    """Raise a one-line ValueError at an option that changes nothing in place of ignoring it."""
    source = next((f"--{name}" for name in ("compare", "table", "samples") if getattr(args, name) is not None), None)
    of_all = [*_OF_RUNS, *_OF_MODELS]
    unused = {"--compare": of_all, "--table": of_all, "--samples": _OF_MODELS}.get(source or "", [])
    given = [name for name in unused if getattr(args, name) != args.subparser.get_default(name)]
    if given:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ValueError(f"{options}: without effect with {source}, which runs no model")


def _score_samples(args: argparse.Namespace, tasks: list[str], limit: int | dict[str, int] | None) -> dict[str, Any]:
    from deepseek_eval.samples_reader import score_samples

    if len(tasks) != 1:
        raise ValueError(f"tasks: {','.join(tasks)} with --samples, expected exactly one, such as humaneval")
    limit = limit.get(tasks[0]) if isinstance(limit, dict) else limit
    options = {name: vars(args)[name] for name in ("output", "overwrite", "allow_weak_sandbox")}
    return score_samples(args.samples, tasks[0], limit=limit, data_path=parse_data(args.data), **options)


def _evaluate_model(args: argparse.Namespace, tasks: list[str], limit: int | dict[str, int] | None) -> dict[str, Any]:
    from deepseek_eval.harness import evaluate_model
    from deepseek_eval.served_model import is_endpoint

    if is_endpoint(args.models[0]):
        _refuse_on_server(args)
        if args.tokenizer is None:
            return evaluate_endpoint(args.models[0], tasks, limit, args)
    return evaluate_model(args.models[0], **_evaluation(args, tasks, limit))


# What a server decides by itself, and what needs its model's tokenizer.
_NOT_OF_SERVERS = ("dtype", "device", "adapter", "experts_implementation")
_OF_TOKENIZERS = ("batch_size", "max_length", "num_samples", "prompt_style", "trust_remote_code")


def _refuse_on_server(args: argparse.Namespace) -> None:
    unused = _NOT_OF_SERVERS if args.tokenizer is not None else (*_NOT_OF_SERVERS, *_OF_TOKENIZERS)
    given = [name for name in unused if getattr(args, name) != args.subparser.get_default(name)]
    if given:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        without = "" if args.tokenizer is not None else " without --tokenizer"
        raise ValueError(f"{options}: without effect on a server{without} ({args.models[0]})")


def evaluate_endpoint(
    url: str, tasks: list[str], limit: int | dict[str, int] | None, args: argparse.Namespace
) -> dict[str, Any]:
    """Have a server write the programs of one task, score them, and return what ``results.json`` holds.

    Args:
        url: The server, with OpenAI's protocol.
        tasks: Names of tasks.
        limit: As for a model.
        args: The options of ``evaluate``.

    Raises:
        ValueError: The task cannot be asked of a server.
    """
    from deepseek_eval.endpoint import check_endpoint_tasks, write_samples
    from deepseek_eval.samples_reader import score_samples

    check_endpoint_tasks(url, tasks)
    if len(tasks) != 1:
        raise ValueError(f"tasks: got {','.join(tasks)} for {url}, expected one, such as humaneval")
    limit = limit.get(tasks[0]) if isinstance(limit, dict) else limit
    output = Path(args.output)
    samples = output.with_name(f"{output.name}.samples.jsonl")
    names = ("max_new_tokens", "temperature", "top_p", "seed", "num_fewshot")
    options_of_task = {"limit": limit, "data_path": parse_data(args.data)}
    write_samples(url, tasks[0], samples, **options_of_task, **{name: getattr(args, name) for name in names})
    options_of_run = {name: getattr(args, name) for name in ("output", "overwrite", "allow_weak_sandbox")}
    return score_samples(samples, tasks[0], **options_of_task, **options_of_run)


def _evaluation(args: argparse.Namespace, tasks: list[str], limit: int | dict[str, int] | None) -> dict[str, Any]:
    names = [name for name in (*_OF_MODELS, "output", "overwrite", "allow_weak_sandbox") if name != "dry_run"]
    options = {name: vars(args)[name] for name in names}
    return {**options, "tasks": tasks, "limit": limit, "data_path": parse_data(args.data)}


def _describe(args: argparse.Namespace, tasks: list[str], limit: int | dict[str, int] | None) -> int:
    """Print what would be asked of each model."""
    from deepseek_eval.dry_run import describe_evaluation

    output = Path(args.output)
    folders = [output] if len(args.models) == 1 else [output / name for name in name_models(args.models)]
    for model, folder in zip(args.models, folders, strict=True):
        print(describe_evaluation(model, **{**_evaluation(args, tasks, limit), "output": str(folder)}))
    return 0


def format_results(results: dict[str, Any], rows: Sequence[Result]) -> str:
    """Return a small table of the figures with errors and 95 % intervals, and what they leave open.

    Args:
        results: What the harness returned.
        rows: The same run's summary.
    """
    layout = "{:<18}{:<24}{:>9}{:>9}  {:<17}{:>7}"
    lines = [layout.format("task", "metric", "value", "stderr", "95 % interval", "n").rstrip()]
    for row in rows:
        interval = score_interval(row)
        between = "-" if interval is None else f"{interval[0]:.4f} to {interval[1]:.4f}"
        error = "-" if row.stderr is None else f"{row.stderr:.4f}"
        lines.append(layout.format(row.task, row.metric, f"{row.value:.4f}", error, between, row.n))
    for task, scores in results["tasks"].items():
        shown = {row.metric for row in rows if row.task == task}
        for metric in (name for name in _further_figures(scores) if name not in shown):
            value, error = (_four_digits(scores[name]) for name in (metric, f"{metric}_stderr"))
            lines.append(layout.format(task, metric, value, error, "-", scores["n"]))
    notes = {row.task: row.does_not_show for row in rows if row.does_not_show}
    limits = [f"- {task}: {note}" for task, note in notes.items()]
    return "\n".join([*lines, *(["", "What these figures do not show:", *limits] if limits else [])])


def _four_digits(number: float | None) -> str:
    return "-" if number is None else f"{number:.4f}"


def _further_figures(scores: dict[str, Any]) -> list[str]:
    """What the table shows besides a task's own figures."""
    return [name for name in scores if name == "macro_acc" or (name.startswith("pass@") and "_" not in name)]
