import argparse
import sys

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


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--to", "gguf", "--runtime", "x"), "--runtime: goes with --to browser only"),
        (("--to", "onnx", "--cache-tokens", "8"), "--cache-tokens: goes with --to executorch only"),
        (("--gather-gib", "2"), "--gather-gib: goes with --to onnx, browser, executorch only"),
        (("--to", "onnx", "--gather-gib", "1e-6"), "16 tokens gather .*--gather-gib"),
        (("--to", "browser", "--runtime", "/nowhere"), "--runtime: got /nowhere with no onnxruntime-web.*npm install"),
    ],
)
def test_options_of_other_formats_and_limits_are_refused(dynamic_model, tmp_path, words, message):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    with pytest.raises(ValueError, match=message):
        run(dynamic_model, tmp_path / "out", *words)
    assert not list(tmp_path.iterdir())


def test_an_occupied_folder_and_an_absent_package_are_told_before_the_work(dynamic_model, tmp_path, monkeypatch):
    for form in ("onnx", "browser", "executorch"):
        with monkeypatch.context() as patched:
            for name in ("onnxruntime", "executorch.runtime"):
                patched.setitem(sys.modules, name, None)
            with pytest.raises(ValueError, match=r"pip install 'deepseek-moe\[(edge|executorch)\]'"):
                run(dynamic_model, tmp_path / "out", "--to", form)
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    (tmp_path / "mine").write_text("keep")
    with pytest.raises(FileExistsError, match="expected an empty or absent folder"):
        run(dynamic_model, tmp_path, "--to", "onnx")
