import itertools
import re

import pytest
import yaml
from huggingface_hub import ModelCard

from deepseek_model_cards.card.card import write_card
from deepseek_model_cards.card.limits import IMBALANCE_BOUND, MEASUREMENTS
from deepseek_model_cards.card.parameter_table import count_checkpoint
from deepseek_records.run_folder import RunFolder
from deepseek_records.summary import Check, DataUse, Result


@pytest.fixture
def card(demo_run):
    return ModelCard.load(write_card(demo_run, repo_id="someone/fox"))


def test_the_card_loads_and_its_metadata_is_valid(card):
    assert card.data.model_name == "fox" and card.data.license is None
    assert len(card.data.eval_results) == 5


def test_the_picture_lies_beside_the_card(card, demo_run):
    name = re.search(r"!\[[^]]+\]\(([^)]+)\)", card.text)[1]
    assert (demo_run / name).read_bytes().startswith(b"\x89PNG")


def test_the_parameters_are_the_checkpoints(card, demo_run):
    table = count_checkpoint(demo_run / "align" / "model")
    assert f"| **total** | **{table.total:,}** |" in card.text
    assert f"| **active per token** | **{table.active:,}** |" in card.text


def test_every_number_of_the_results_is_in_the_card(card, demo_run):
    for name in ("pretrain", "adapt", "align", "evaluate"):
        for row in RunFolder(demo_run / name).summary.results:
            value = f"{row.value:.3f}".rstrip("0").rstrip(".")
            assert value in card.text, row


def test_what_was_not_measured_is_listed_and_what_was_is_not(card):
    section = card.text.split("## Not measured")[1].split("##")[0]
    assert "social bias" in section and "robustness" in section
    assert "MMLU" not in section and "HumanEval" not in section


def test_a_lone_stage_lists_the_benchmarks_as_not_measured(tmp_path, builders):
    builders["pretrain"](tmp_path)
    text = ModelCard.load(write_card(tmp_path / "pretrain")).text
    section = text.split("## Not measured")[1]
    missing = [words for words, _ in MEASUREMENTS if "held-out text" not in words]
    assert all(words in section for words in missing)
    assert "No benchmark was run." in text and not (tmp_path / "pretrain" / ".eval_results").exists()


def test_the_card_is_honest_about_chance(card):
    limits = card.text.split("## Limits")[1].split("##")[0]
    assert "MMLU, test: 0.263 \u00b1 0.041, at chance." in limits
    assert "none solved (under 1.8% at 95 % confidence)" in limits


def test_the_card_names_commands_versions_licences_and_harness(card):
    assert "transformers 5." in card.text and "deepseek-moe 0." in card.text
    assert "public domain" in card.text and "cc-by-4.0" in card.text


def test_no_local_path_and_no_token_is_in_the_card(demo_run, monkeypatch):
    monkeypatch.setenv("HUB_TOKEN", "planted-value-123456")
    run = RunFolder(demo_run / "pretrain")
    settings = {**run.settings, "data": "/home/someone/books", "note": "planted-value-123456"}
    (run.path / "recipe.yaml").write_text(yaml.safe_dump(settings))
    text = write_card(demo_run).read_text()
    for planted in ("/home/someone", "planted-value", str(demo_run), "/tmp/"):
        assert planted not in text


def test_a_model_that_v3_cannot_express_is_not_promised_an_export(card):
    """The demo's model takes 1 to 3 experts per token, and `export --to deepseek_v3` refuses that."""
    assert "deepseek-moe export" not in card.text
    blocks = re.findall(r"```(python|bash)\n(.*?)```", card.text.split("## How to load it")[1], re.DOTALL)
    assert [language for language, _ in blocks] == ["python", "python"]
    assert all("someone/fox" in code for _, code in blocks)


def test_a_reward_is_described_only_where_there_was_one(demo_run, card):
    assert "The reward of its alignment" in card.text
    text = write_card(demo_run / "pretrain").read_text()
    assert "eward of its" not in text and "aligned" not in text and "ppo" not in text


def test_uneven_load_is_said_and_the_bound_is_the_trainings(tmp_path, builders):
    from deepseek_training.balance.callback import IMBALANCE_BOUND as bound_of_training

    assert bound_of_training == IMBALANCE_BOUND
    for name, loads, is_said in (("even", [(10, 11, 9, 10, 10, 10)], False), ("uneven", [(0, 0, 0, 0, 1, 29)], True)):
        run = builders["stage"](tmp_path / name, "pretrain", settings={}, summary={"tokens_per_expert": loads})
        text = write_card(run.path).read_text()
        assert ("the experts' load ended uneven" in text) == is_said
    assert "got 5.8 times the mean (a warning is given above 4), and 4 of 6 experts got no token." in text


def test_the_command_that_measures_again_names_model_and_tasks(card):
    command = re.search(r"To measure again: `([^`]+)`", card.text)[1]
    assert command == "deepseek-moe evaluate someone/fox --tasks mmlu,humaneval --output measured-again"


@pytest.mark.parametrize(("kind", "word"), [("dpo", "DPO"), ("grpo", "GRPO"), ("align", "PPO")])
def test_an_alignment_is_called_what_it_was(tmp_path, builders, kind, word):
    run = builders["stage"](tmp_path, kind, settings={"model": "org/small"}, summary={"base_model": "org/small"})
    run.model_path.mkdir()
    (run.model_path / "config.json").write_text('{"model_type": "llama"}')
    card = ModelCard.load(write_card(run.path))
    assert f"aligned by {word}" in card.text and word.lower() in card.data.tags
    is_rewarded = kind != "dpo"
    assert ("The reward of its alignment" in card.text) == is_rewarded
    assert ("reinforcement-learning" in card.data.tags) == is_rewarded
    assert "base_model:\n- org/small" in card.content


@pytest.mark.slow  # two imports of torch in a process of its own
def test_the_card_loads_its_model_without_our_package(demo_run):
    """The card's own code, run on the local folder in place of the Hub id, each in a clean process."""
    import subprocess
    import sys

    model = demo_run / "align" / "model"
    text = write_card(demo_run, repo_id="someone/fox").read_text()
    code = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[1].replace("someone/fox", str(model))
    # Only transformers' own modules may be seen: the second way must not need our package.
    blocked = "import sys; sys.modules['modeling_deepseek'] = None; sys.modules['deepseek_kernels'] = None\n"
    done = subprocess.run([sys.executable, "-c", blocked + code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("Once upon a time")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("---\n{{ card_data }}\n---\n{% for x in %}", "line 4"),
        ("---\n{{ card_data }}\n---\n{{ paramters.total }}", "got 'paramters' in .*, expected one of .*parameters"),
        ("# {{ name }}", "without '{{ card_data }}'"),
    ],
)
def test_a_faulty_template_is_one_line_and_writes_nothing(demo_run, tmp_path, text, message):
    template = tmp_path / "mine.md"
    template.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        write_card(demo_run, template=template, output=tmp_path / "out")
    assert "\n" not in str(error.value) and not (tmp_path / "out" / "README.md").exists()


def test_a_users_template_replaces_ours(demo_run, tmp_path):
    template = tmp_path / "mine.md"
    template.write_text("---\n{{ card_data }}\n---\n# {{ name }}: {{ parameters.total }} parameters\n")
    card = ModelCard.load(write_card(demo_run, name="fox", template=template, license="apache-2.0"))
    assert card.text.strip().startswith("# fox: ") and card.data.license == "apache-2.0"


def test_bad_input_ends_in_one_line(demo_run, tmp_path):
    cases = [
        (FileNotFoundError, "template", {"run_path": demo_run, "template": tmp_path / "absent.md"}),
        (ValueError, "license: got 'mine', expected", {"run_path": demo_run, "license": "mine"}),
        (FileNotFoundError, "run", {"run_path": tmp_path / "absent"}),
    ]
    for kind, word, arguments in cases:
        with pytest.raises(kind, match=word) as error:
            write_card(**arguments)
        assert "\n" not in str(error.value)


def test_writing_twice_gives_the_same_card(demo_run):
    assert write_card(demo_run).read_bytes() == write_card(demo_run).read_bytes()


def test_a_pipe_in_a_name_breaks_no_table(tmp_path, builders):
    evil = "a|b\nc`d\\|e <i>"
    data = [DataUse(name=evil, license=evil, source=evil, split=evil, num_rows=1, num_bytes=2)]
    results = [Result(metric=metric, dataset=evil, split=evil, value=0.5) for metric in ("acc", "reward_safety")]
    checks = [Check(name=evil, value=1.0, passed=False)]
    summary = {"data": data, "results": results, "checks": checks}
    run = builders["stage"](tmp_path, "pretrain", settings={"a": "```"}, summary=summary)
    text = write_card(run.path).read_text()
    lines = text.splitlines()
    tables = [i for i, line in enumerate(lines) if re.fullmatch(r"\|( -+:? \|)+", line.replace("---:", "---"))]
    assert len(tables) == 4
    for i in tables:
        columns = lines[i - 1].count("|")
        rows = list(itertools.takewhile(lambda line: line.startswith("|"), lines[i + 1 :]))
        assert rows and all(len(re.findall(r"(?<!\\)(?:\\\\)*\|", row)) == columns for row in rows), rows
    assert "<i>" not in "".join(line for line in lines if line.startswith("|"))


@pytest.mark.parametrize("kind", ["adapt", "sft", "dpo", "align", "grpo"])
def test_an_adapter_is_named_where_one_was_trained(tmp_path, builders, kind):
    for rank, targets, words in (
        (8, None, "LoRA of rank 8 on attention and routed experts"),
        (4, ["q_proj"], "LoRA of rank 4 on q_proj"),
        (0, None, None),
    ):
        folder = tmp_path / f"{kind}{rank}"
        settings = {"model": "base", "lora_rank": rank, "lora_targets": targets}
        run = builders["stage"](folder, kind, settings=settings, summary={"results": []})
        text = write_card(run.path).read_text()
        assert (words in text) if words else ("LoRA" not in text)
