import argparse

import pytest
import torch

from deepseek_cli import export
from deepseek_training.data.tokenizer import train_tokenizer
from modeling_deepseek import DeepseekConfig, DeepseekForCausalLM

gguf = pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def dynamic_model(tmp_path_factory):
    """A checkpoint whose tokens use 1 to 3 experts."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model")
    config = DeepseekConfig.from_preset("debug", vocab_size=300, num_experts_per_tok=3, min_experts_per_tok=1)
    DeepseekForCausalLM(config).save_pretrained(path)
    train_tokenizer(["a fox and a crow"] * 4, 300).save_pretrained(path)
    return path


def run(*words) -> int:
    parser = argparse.ArgumentParser()
    export.add_arguments(parser)
    return export.run(parser.parse_args([str(word) for word in words]))


def test_gguf_at_a_fixed_number_prints_what_that_changes(dynamic_model, tmp_path, capsys):
    assert run(dynamic_model, tmp_path / "fox.gguf", "--to", "gguf", "--fixed-experts", 2) == 0
    printed = capsys.readouterr().out
    assert "at 2 experts per token instead of a dynamic number: mean KL" in printed
    reader = gguf.GGUFReader(tmp_path / "fox.gguf")
    assert reader.fields["deepseek2.expert_used_count"].contents() == 2


def test_a_dynamic_number_is_not_fixed_unasked(dynamic_model, tmp_path):
    with pytest.raises(ValueError, match="--fixed-experts"):
        run(dynamic_model, tmp_path / "fox.gguf", "--to", "gguf")
    with pytest.raises(ValueError, match="--to gguf only"):
        run(dynamic_model, tmp_path / "out", "--fixed-experts", 2)
    assert not (tmp_path / "out").exists()
