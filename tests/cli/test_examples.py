"""The command lines that ``--help`` and the pages show: each is understood, and each runs on the demo's models.

The folder holds what the examples name: the demo's runs, and a reader's own texts, pairs and models under the names
that are printed. By default every line is parsed and its recipe built, and the quick ones run. Marked slow, the others
run: a training on a recipe of the demo's size with ``--dry-run``, a whole benchmark with ``--limit 1``. Not run are
benchmarks (`tests/cli/benchmarks`), the demo itself (`test_demo.py`), the server (`test_serve.py`), several processes,
uploads, and what is fetched from the Hub or has to be asked for.
"""

import importlib
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from deepseek_cli import bench
from deepseek_cli.main import SUBCOMMANDS, _parse, build_parser, main
from deepseek_training.data.texts import load_texts
from deepseek_training.recipes.loading import collect_overrides, load_recipe
from deepseek_training.recipes.write_docs import STAGES

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = "|".join(SUBCOMMANDS)
LINE = re.compile(rf"^\s*(?:\$ )?(?:deepseek-moe|torchrun .*-m deepseek_cli\.main) ((?:{COMMANDS}) .*)$", re.MULTILINE)
QUICK = ("params", "generate runs/demo")
NOT_RUN = (
    *("update runs", "runs/demo/adapt/current"),  # what a model of debug size learns is refused; see `test_update.py`
    *("--compare", "crows_pairs", "org/name", "tempt", "runs/two", "--private", "--revision", "--use-mtp"),
    "--allow-weak-sandbox",
    *("path/to/fixed", "--to expert_lora", "my-sft.yaml", "runs/seed-0"),  # what the demo does not make
    *(
        "path/to/llama",
        "runs/demo-real",
        "-real ",
    ),  # no dense model is at hand; test_upcycle.py and make demo-real run them
    "push runs/demo someone/my-moe --license apache-2.0",  # needs the Hub
    *("distill distill-demo", "hidden_size=96", "--group 32"),  # too large for this demo, which is of debug size
)
OWN_MODELS = ("my-model", "path/to/model")


def find_examples() -> dict[tuple[str, ...], str]:
    """The words of each line once, with where it stands."""
    texts = {f"{name} --help": importlib.import_module(f"deepseek_cli.{name}").EXAMPLES for name in SUBCOMMANDS}
    texts |= {f"bench {one.name} --help": one.examples for one in bench.BENCHMARKS}
    texts |= {path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}
    found: dict[tuple[str, ...], str] = {}
    for where, text in texts.items():
        for line in LINE.findall(text.replace("\\\n", " ")):
            words = ["runs/demo/align/model" if word == "MODEL" else word for word in shlex.split(line, comments=True)]
            found.setdefault(tuple(words), where)
    return found


EXAMPLES = find_examples()


def write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def folder(demo_folder, tmp_path_factory):
    """The demo's folder, with what the examples name beside it."""
    root = Path(shutil.copytree(demo_folder, tmp_path_factory.mktemp("examples") / "here"))
    for name in OWN_MODELS:
        shutil.copytree(root / "runs/demo/pretrain/model", root / name)
    (root / "tests/eval/reference").mkdir(parents=True)
    (root / "tests/eval/reference/ours").symlink_to(ROOT / "tests/eval/reference/ours")
    texts = load_texts("medicine")[:400]
    (root / "my_texts").mkdir()
    for number in range(20):
        (root / "my_texts" / f"{number}.txt").write_text("\n\n".join(texts[number::20]))
    write_rows(root / "my_domain.jsonl", [{"text": text} for text in texts])
    shutil.copy(ROOT / "training/recipes/pretrain-debug.yaml", root / "my_recipe.yaml")
    shutil.copy(ROOT / "training/recipes/data-debug.yaml", root / "my_data.yaml")
    questions = [f"What is {number}?" for number in range(400)]
    chats = [[{"role": "user", "content": q}, {"role": "assistant", "content": "A number."}] for q in questions]
    write_rows(root / "my_conversations.jsonl", [{"messages": chat} for chat in chats])
    write_rows(root / "prompts.jsonl", [{"prompt": question} for question in questions])
    pairs = [{"prompt": question, "chosen": "A number.", "rejected": "No."} for question in questions[:80]]
    write_rows(root / "preferences.jsonl", pairs)
    tasks = [{"task_id": f"HumanEval/{number}", "completion": "    pass\n"} for number in range(164)]
    write_rows(root / "completions.jsonl", tasks)
    return root


@pytest.fixture
def here(folder, monkeypatch):
    monkeypatch.chdir(folder)
    return folder


def test_there_are_examples_for_every_command():
    assert {words[0] for words in EXAMPLES} == set(SUBCOMMANDS)
    assert len(EXAMPLES) > 60


def test_every_example_is_understood(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "training/recipes/pretrain-debug.yaml", "my_recipe.yaml")
    shutil.copy(ROOT / "training/recipes/data-debug.yaml", "my_data.yaml")
    parser = build_parser()
    for words, where in EXAMPLES.items():
        try:
            args = _parse(parser, list(words))
            if words[0] in STAGES and words[1] != "graph" and words[0] != "update":  # its settings are of the run
                load_recipe(args.recipe, STAGES[words[0]], collect_overrides(args))
        except (SystemExit, ValueError, FileNotFoundError) as error:
            pytest.fail(f"{where}: {shlex.join(words)}: {error}")


def runnable(*, is_quick: bool) -> list[tuple[str, ...]]:
    """The examples that can run here; the quick ones, or all."""
    lines = {words: " ".join(words) for words in EXAMPLES if words[0] not in ("bench", "demo", "serve", "monitor")}
    kept = [words for words, line in lines.items() if not any(part in line for part in NOT_RUN)]
    return [words for words in kept if not is_quick or lines[words].startswith(QUICK)]


def run_all(examples: list[tuple[str, ...]], capsys) -> None:
    """Run each as it is printed, in order, as a reader would who tries them one after the other."""
    failed = []
    for example in examples:
        words = list(example)
        is_long = words[0] in STAGES and words[1].endswith("-demo") and "--dry-run" not in words
        if (
            "--output" in words
            and words[0] != "launch"
            and Path(words[words.index("--output") + 1], "summary.json").exists()
        ):
            words.append("--overwrite")  # another page shows the same folder
        if words[0] == "evaluate" and not {"--limit", "--samples"} & set(words):
            words += ["--limit", "1"]
        code = main([*words, "--dry-run"] if is_long else words)
        if code not in (0, 3):
            failed.append(f"{EXAMPLES[example]}: {shlex.join(words)}: {capsys.readouterr().err[-600:]}")
    assert not failed, "\n".join(failed)


@pytest.mark.xdist_group("demo")
def test_the_quick_examples_run(here, capsys):
    examples = runnable(is_quick=True)
    assert len(examples) > 6
    run_all(examples, capsys)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.xdist_group("demo")
def test_the_other_examples_run(here, capsys):
    examples = runnable(is_quick=False)
    assert len(examples) > 40
    run_all(examples, capsys)
