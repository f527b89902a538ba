"""The measurement of whole models: what it builds and writes; all of it on small models in the slow run."""

import json
import os
import subprocess
import sys

import pytest
import torch
from transformers.loss.loss_utils import ForCausalLMLoss

pytest.importorskip("peft")
pytest.importorskip("triton")

from deepseek_cli.benchmarks import whole_model_on_gpu as bench
from deepseek_cli.benchmarks.drawn_models import adapted, build, changed, tiny
from deepseek_cli.benchmarks.finetune_count import count, released_models
from deepseek_cli.benchmarks.kernel_memory import peak_memory


def test_a_shorter_model_keeps_all_other_sizes():
    for config in released_models().values():
        shorter = changed(config, num_hidden_layers=2, vocab_size=4096)
        left_out = {"num_hidden_layers", "vocab_size", "mlp_layer_types"}
        one, other = ({k: v for k, v in c.to_dict().items() if k not in left_out} for c in (config, shorter))
        assert one == other


def test_a_model_in_4_bits_takes_what_is_counted():
    config = tiny(released_models()["Moonlight-16B-A3B"])
    model = adapted(build(config, "4-bit", "cpu"))
    experts = sum(b.nbytes for name, b in model.named_buffers() if ".four_bit." in name)
    leaves = [p for p in model.parameters() if p.requires_grad]
    counted_experts, _, counted_adapter, *_ = count(config, "")[1]
    assert experts == counted_experts
    assert {p.dtype for p in leaves} == {torch.float32} and 12 * sum(p.numel() for p in leaves) == counted_adapter


@pytest.mark.slow
def test_the_loss_takes_twelve_bytes_per_logit():
    num_tokens, vocabulary = 256, 65536
    hidden = torch.randn(num_tokens, 8).bfloat16().requires_grad_()
    head, labels = torch.randn(vocabulary, 8).bfloat16(), torch.arange(num_tokens)

    def step():
        ForCausalLMLoss(hidden @ head.T, labels, vocabulary).backward()

    step()
    peak = peak_memory(step, "cpu")
    assert peak is None or 11.5 <= peak / num_tokens / vocabulary <= 12.8


def test_what_does_not_fit_or_has_no_time_is_said(tmp_path):
    def fail():
        raise torch.OutOfMemoryError("out")

    run = bench.Measurement(tmp_path / "rows.json", "cpu", 60, 0.1)
    row = {"model": "M", "kind": "bf16", "what": "train", "implementation": "grouped_mm"}
    run.result["counted_gib"] = {}
    assert run.add(dict(row), fail)["out_of_memory"]
    assert run.add(dict(row), lambda: 1 / 0)["failed"] == "ZeroDivisionError: division by zero"
    run.end = 0
    assert run.add(dict(row), fail)["left_out"] == "no time"
    assert json.loads((tmp_path / "rows.json").read_text()) == run.result
    lines = bench.table(run.result).splitlines()
    assert lines[2:] == [
        f"| M | bf16 | train | grouped_mm | {why} |  |  |  |"
        for why in ("out of memory", "ZeroDivisionError: division by zero", "no time")
    ]


def test_it_needs_a_gpu(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit, match="2"):
        bench.main([])
    assert "expected --tiny" in capsys.readouterr().err


@pytest.mark.slow
def test_every_row_of_small_models(tmp_path):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "deepseek_cli.benchmarks.whole_model_on_gpu", "--tiny", "--per-row", "0.05"]
    done = subprocess.run([*command, "--output", str(tmp_path)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads((tmp_path / bench.FILE).read_text())["rows"]
    assert len(rows) == 3 * (2 + 1 + 2 + 3 + 2)
    timed = [row for row in rows if row["what"] != "build"]
    assert all(row["tokens_per_second"] > 0 for row in timed)
    assert all(row["logits_error"] < 1e-2 for row in timed if "logits_error" in row)
    for name in released_models():
        one, other = (
            row["loss"] for row in timed if row["model"] == name and (row["kind"], row["what"]) == ("bf16", "train")
        )
        assert one == pytest.approx(other, rel=1e-3)
