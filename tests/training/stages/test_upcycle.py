"""The command that upcycles: what it writes, that the result is a model like any other, and what it refuses."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from deepseek_cli.main import main
from deepseek_records.loading import load_model
from deepseek_records.run_folder import RunFolder
from deepseek_training.data.texts import load_texts
from deepseek_training.data.tokenizer import train_tokenizer

SMALL = ["--sequence-length", "32", "--eval-bytes", "1000"]


@pytest.fixture(scope="module")
def dense(tiny_data, tmp_path_factory):
    path = tmp_path_factory.mktemp("dense")
    tokenizer = train_tokenizer(load_texts(str(tiny_data)), 300)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes, **heads)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def upcycle(dense, tiny_data, output, *words):
    return main(["upcycle", str(dense), str(output), *words, "--data", str(tiny_data), *SMALL])


def test_the_result_is_a_run_and_a_model_that_other_commands_take(dense, tiny_data, tmp_path, capsys):
    words = ["--n-routed-experts", "4", "--num-experts-per-tok", "2"]
    assert upcycle(dense, tiny_data, tmp_path / "run", *words, "--dry-run") == 0
    assert "mixtral" in capsys.readouterr().out and not (tmp_path / "run").exists()
    assert upcycle(dense, tiny_data, tmp_path / "run", *words) == 0
    told = capsys.readouterr().out
    summary = RunFolder(tmp_path / "run").summary
    before, after = summary.results
    assert after.value == pytest.approx(before.value, rel=1e-5)
    assert summary.details["share_of_other_positions"] == 0 and summary.details["max_logit_difference"] < 1e-4
    sparse = load_model(tmp_path / "run")
    assert sparse.num_parameters() == summary.num_parameters
    assert f"mixtral of {summary.num_parameters:,}" in told
    one_expert = 3 * 32 * 48 * 2
    assert f"{summary.num_parameters - 2 * one_expert:,} parameters active per token" in told
    assert main(["generate", str(tmp_path / "run"), "--prompt", "the", "--max-new-tokens", "2"]) == 0
    assert main(["upcycle", str(tmp_path / "run"), str(tmp_path / "again"), "--data", str(tiny_data)]) == 2
    assert "got type mixtral, expected a dense model" in capsys.readouterr().err
    assert upcycle(dense, tiny_data, tmp_path / "run", "--seed", "1") == 2
    assert str(tmp_path / "run") in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--num-experts-per-tok", "9"], "num_experts_per_tok: got 9"),
        (["--router-std", "-1"], "router_std: got -1"),
        (["--granularity", "x"], "granularity: got 'x'"),
        (["--sequence-length", "4096"], "sequence_length: got 4096"),
    ],
)
def test_bad_input_ends_in_one_line(dense, tiny_data, tmp_path, capsys, words, expected):
    small = [] if "--sequence-length" in words else SMALL
    assert main(["upcycle", str(dense), str(tmp_path / "run"), *words, "--data", str(tiny_data), *small]) == 2
    told = capsys.readouterr().err
    assert expected in told and len(told.splitlines()) == 1 and not (tmp_path / "run").exists()


def test_a_mixture_that_computes_something_else_is_refused(dense, tiny_data, tmp_path, capsys, monkeypatch):
    import deepseek_training.stages.upcycle as stage

    def broken(*args, **settings):
        sparse = original(*args, **settings)
        sparse.model.layers[0].mlp.experts.down_proj.data *= 1.5
        return sparse

    original = stage.upcycle_model
    monkeypatch.setattr(stage, "upcycle_model", broken)
    assert upcycle(dense, tiny_data, tmp_path / "run") == 1
    assert "does not compute what llama does" in capsys.readouterr().err
    assert not (tmp_path / "run" / "model").exists()
