"""Whole conversations, with a system message and several turns, in `sft` and as prompts of `align`."""

import json

import pytest

from deepseek_cli.main import main
from deepseek_records.loading import load_tokenizer
from deepseek_records.run_folder import RunFolder
from deepseek_training.data.conversations import load_conversations
from deepseek_training.data.prompts import load_prompts
from deepseek_training.recipes.align import AlignRecipe
from deepseek_training.recipes.loading import load_recipe
from deepseek_training.recipes.sft import SftRecipe

SYSTEM = {"role": "system", "content": "Answer in few words."}


def conversation(i):
    turns = [f"What is {i} and {i}?", f"It is {2 * i}.", "And one more?", f"It is {2 * i + 1}."]
    roles = ("user", "assistant", "user", "assistant")
    spoken = [{"role": role, "content": text} for role, text in zip(roles, turns, strict=True)]
    return [SYSTEM, *spoken] if i % 2 else spoken


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "chats.jsonl"
    splits = ["train"] * 24 + ["validation"] * 8
    path.write_text(
        "".join(json.dumps({"messages": conversation(i), "split": s}) + "\n" for i, s in enumerate(splits))
    )
    return str(path)


def test_sft(policy_path, path, tmp_path, capsys):
    command = ["sft", "sft-debug", "--model", str(policy_path), "--data", path, "--sources", "[]", "--report-to", "[]"]
    assert main([*command, "--max-steps", "10", "--learning-rate", "0.01", "--output", str(tmp_path / "run")]) == 0
    summary = RunFolder(tmp_path / "run").summary
    assert [use.num_rows for use in summary.data] == [24, 8]
    assert summary.results[1].value < summary.results[0].value
    # Both answers of each held-out conversation count: "It is 48." and "It is 49.", with a space or not.
    recipe = load_recipe("sft-debug", SftRecipe, {"data": path, "sources": []})
    rows = load_conversations(recipe, "validation")
    spoken = sum(len(m["content"]) for row in rows for m in row["messages"] if m["role"] == "assistant")
    assert spoken <= summary.results[0].num_bytes <= spoken + 2 * len(rows)
    assert {sample.prompt for sample in summary.samples} == {"And one more?"}


def test_prompts_of_align_are_put_by_the_chat_template(policy_path, path):
    recipe = AlignRecipe(model=str(policy_path), prompts=path, prompt_template=None)
    tokenizer = load_tokenizer(str(policy_path))
    prompts = load_prompts(recipe, tokenizer, "train")
    assert prompts[1]["prompt"] == conversation(1)[:-1]
    assert tokenizer.decode(prompts[1]["input_ids"]) == (
        "<|begin|>Answer in few words.\n\nUser: What is 1 and 1?\n\nAssistant: It is 2.<|end|>"
        "User: And one more?\n\nAssistant:"
    )


@pytest.mark.slow
def test_align(policy_path, path, tmp_path):
    command = ["align", "align-debug", "--model", str(policy_path), "--prompts", path, "--prompt-template", "null"]
    assert main([*command, "--output", str(tmp_path / "run")]) == 0
    summary = RunFolder(tmp_path / "run").summary
    assert {sample.prompt for sample in summary.samples} == {"And one more?"}
    assert [use.num_rows for use in summary.data] == [24, 8]


def test_prompts_of_both_kinds_become_conversations(policy_path, tmp_path):
    rows = [{"prompt": conversation(0)[:1], "split": "train"}, {"prompt": "Why?", "split": "train"}]
    (tmp_path / "mixed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = AlignRecipe(model=str(policy_path), prompts=str(tmp_path / "mixed.jsonl"), prompt_template=None)
    prompts = load_prompts(recipe, load_tokenizer(str(policy_path)), "train")
    assert [prompt[-1]["content"] for prompt in prompts["prompt"]] == ["What is 0 and 0?", "Why?"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": "no list"}, "expected messages"),
        ({"messages": [{"role": "user", "content": "Only asked."}]}, "without a turn of the assistant"),
        ({"messages": [{"content": "no role"}]}, "not text"),
    ],
)
def test_bad_conversations_are_one_line(policy_path, tmp_path, capsys, row, message):
    lines = [{**row, "split": split} for split in ("train", "validation", "validation")]
    (tmp_path / "bad.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = ["sft", "sft-debug", "--model", str(policy_path), "--data", str(tmp_path / "bad.jsonl")]
    assert main([*command, "--sources", "[]", "--output", str(tmp_path / "run")]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
