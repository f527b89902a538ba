"""The command as users meet it: help with defaults and examples, and one line with exit code 2 for what they mend."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from run_deepseek_moe import ENVIRONMENT
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, MambaConfig

from deepseek_cli.main import SUBCOMMANDS, main
from deepseek_records.loading import load_model
from deepseek_records.run_folder import RunFolder
from deepseek_training.data.tokenizer import train_tokenizer
from modeling_deepseek import DeepseekConfig


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A random debug-size model with a tokenizer of its own."""
    folder = tmp_path_factory.mktemp("checkpoint")
    tokenizer = train_tokenizer(["a small text to learn letters from " * 20], 300)
    torch.manual_seed(0)
    # A fixed number of experts, so that `export` finds nothing to refuse before it reads the weights.
    fixed = {"min_experts_per_tok": None, "target_experts_per_tok": None}
    config = DeepseekConfig.from_preset("debug", vocab_size=len(tokenizer), **fixed)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def broken(checkpoint, tmp_path) -> Path:
    """The same checkpoint with its weights cut in half, as by a full disk."""
    folder = tmp_path / "broken"
    shutil.copytree(checkpoint, folder)
    weights = folder / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    return folder


@pytest.mark.parametrize("name", SUBCOMMANDS)
def test_each_subcommand_has_help_with_examples(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([name, "--help"])
    printed = capsys.readouterr().out
    assert stopped.value.code == 0
    assert f"deepseek-moe {name}" in printed.split("examples:")[1]
    assert importlib.import_module(f"deepseek_cli.{name}").HELP.split()[0] in printed


def error_line(capsys, *arguments: str) -> str:
    """Run the command in this process; it must end with code 2 and one line on stderr."""
    try:
        code = main(list(arguments))
    except SystemExit as stopped:
        code = stopped.code
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if "%|" not in line and "it/s" not in line and line.strip()]
    assert code == 2, captured.err
    assert len(lines) == 1, captured.err
    return lines[0]


def pretrain_arguments(tmp_path, *more: str) -> list[str]:
    return ["pretrain", "pretrain-debug", "--output", str(tmp_path / "run"), *more]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--learnig-rate", "1"], "did you mean --learning-rate?"),
        (["--data", "nowhere.txt"], "nowhere.txt"),
        (["--learning-rate", "fast"], "learning_rate"),
        (["--model", "{num_experts_per_tok: 99}"], "num_experts_per_tok: got 99, expected"),
        (["--model", "{num_experts_per_tok: 2, min_experts_per_tok: 3}"], "min_experts_per_tok: got 3"),
        (["--model", "{num_expert_per_tok: 2}"], "did you mean num_experts_per_tok"),
        (["--sequence-length", "4096"], "max_position_embeddings"),
        (["--preset", "huge"], "154b"),
        (["--model", "{routed_scaling_factor: a}"], "routed_scaling_factor"),
        (["--model", "{hidden_act: foo}"], "hidden_act"),
        (["--model", "{"], "--model '{' is not a YAML value"),
        (["--learning-rate", "nan"], "learning_rate: got 'nan', expected a number"),
        (["--learning-rate", "1e400"], "learning_rate: got inf, expected above 0, and finite"),
        (["--bias-update-speed", "-1"], "bias_update_speed: got -1.0, expected null or at least 0"),
        (["--seed", "4294967296"], "seed: got 4294967296, expected below 2**32"),
        (["--output", "x" * 300], "expected a folder's name (File name too long)"),
        (["--output", "/proc/nowhere/run"], "output: got /proc/nowhere/run, expected a folder that can be written"),
        (["--model", "{n_routed_experts: 1000000000000}"], "not enough memory ("),
    ],
)
def test_wrong_settings(capsys, tmp_path, arguments, expected):
    assert expected in error_line(capsys, *pretrain_arguments(tmp_path, *arguments))


def test_unknown_recipe_key_names_the_nearest(capsys, tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("learnig_rate: 0.1\n")
    line = error_line(capsys, "pretrain", str(recipe), "--output", str(tmp_path / "run"))
    assert "learnig_rate" in line and "learning_rate" in line


@pytest.mark.parametrize(
    ("content", "expected"), [(b"", "empty"), (bytes(range(128, 256)) * 40, "not UTF-8")], ids=["empty", "binary"]
)
def test_unusable_data_files(capsys, tmp_path, content, expected):
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    line = error_line(capsys, *pretrain_arguments(tmp_path, "--data", str(path)))
    assert expected in line and "text.txt" in line


def test_a_refused_run_leaves_the_folder_usable(capsys, tmp_path):
    error_line(capsys, *pretrain_arguments(tmp_path, "--model", "{num_experts_per_tok: 99}"))
    # The corrected call gets past the folder: its own mistake is named, not the folder.
    line = error_line(capsys, *pretrain_arguments(tmp_path, "--model", "{num_experts_per_tok: 98}"))
    assert "98" in line and "holds another run" not in line


def test_output_that_holds_another_run(capsys, tmp_path):
    RunFolder.create(tmp_path / "run", {"seed": 1}, command="pretrain").log({"step": 1})
    assert "holds another run" in error_line(capsys, *pretrain_arguments(tmp_path))
    assert (tmp_path / "run" / "metrics.jsonl").exists()


def test_output_that_holds_someone_elses_files(capsys, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years of work")
    assert "not empty" in error_line(capsys, *pretrain_arguments(tmp_path, "--overwrite"))
    assert (tmp_path / "run" / "thesis.tex").read_text() == "years of work"


def test_a_prompt_longer_than_the_context(capsys, checkpoint):
    line = error_line(capsys, "generate", str(checkpoint), "--prompt", "many words " * 600)
    assert "512" in line and "--prompt" in line


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--temperature", "nan", "--temperature: got nan"),
        ("--temperature", "inf", "--temperature: got inf"),
        ("--seed", "-1", "--seed: got -1, expected 0 to 2**32 - 1"),
        ("--prompt", "caf\udce9", "--prompt: got bytes that are not UTF-8, expected text"),
    ],
)
def test_what_generate_cannot_use(capsys, checkpoint, option, value, expected):
    assert expected in error_line(capsys, "generate", str(checkpoint), "--prompt", "hello", option, value)


@pytest.mark.parametrize("command", ["params", "generate", "gguf"])
@pytest.mark.parametrize(
    ("content", "expected"), [("[1]", "holds list, expected an object"), ("{", "got no JSON"), (None, "hidden_size")]
)
def test_a_broken_config(capsys, checkpoint, tmp_path, command, content, expected):
    folder = shutil.copytree(checkpoint, tmp_path / "broken")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(content or json.dumps({**settings, "hidden_size": "x"}))
    arguments = {
        "params": ["params", str(folder)],
        "generate": ["generate", str(folder), "--prompt", "hello"],
        "gguf": ["export", str(folder), str(tmp_path / "model.gguf"), "--to", "gguf"],
    }[command]
    assert expected in error_line(capsys, *arguments)


@pytest.mark.parametrize("command", ["generate", "evaluate", "export", "align", "adapt"])
def test_a_checkpoint_cut_short(capsys, broken, tmp_path, command):
    arguments = {
        "generate": ["generate", str(broken), "--prompt", "hello"],
        "evaluate": ["evaluate", str(broken), "--output", str(tmp_path / "out")],
        "export": ["export", str(broken), str(tmp_path / "out"), "--to", "deepseek_v3"],
        "align": ["align", "align-debug", "--model", str(broken), "--output", str(tmp_path / "out")],
        "adapt": ["adapt", "adapt-debug", "--model", str(broken), "--output", str(tmp_path / "out")],
    }[command]
    assert "cut short" in error_line(capsys, *arguments)


def _command(name: str, model: Path, output: Path) -> list[str]:
    """A short call of a command that loads a model and its tokenizer."""
    return {
        "generate": ["generate", str(model), "--prompt", "hello"],
        "evaluate": ["evaluate", str(model), "--tasks", "mmlu", "--limit", "1", "--output", str(output)],
        "adapt": ["adapt", "adapt-debug", "--model", str(model), "--output", str(output)],
        "sft": ["sft", "sft-debug", "--model", str(model), "--output", str(output)],
        "align": ["align", "align-debug", "--model", str(model), "--output", str(output)],
    }[name]


@pytest.mark.parametrize("command", ["generate", "evaluate"])
@pytest.mark.parametrize(
    ("content", "expected"),
    [(b"", "pickle weights"), (b"cos\nsystem\n(S'false'\ntR.", "pickle weights"), (b"\x80", "pickle")],
    ids=["empty", "code", "damaged"],
)
def test_pickle_weights_that_are_no_tensors(capsys, checkpoint, tmp_path, command, content, expected):
    folder = shutil.copytree(checkpoint, tmp_path / "pickle")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(content)
    assert re.search(expected, error_line(capsys, *_command(command, folder, tmp_path / "out")))


def test_pickle_weights_of_tensors_load(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "pickle")
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    loaded, expected = load_model(folder).state_dict(), load_model(checkpoint).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())


# Each asks for a library that the package does not bring, or is no quantization at all.
QUANTIZED = [
    ({"quant_method": "awq"}, "asks for a library that is not installed"),
    ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "asks for a library that is not installed"),
    ({"load_in_8bit": True}, "asks for a library that is not installed"),
    ({"quant_method": "gptq", "bits": 4}, "asks for a library that is not installed"),
    ({"quant_method": "hqq"}, "asks for a library that is not installed"),
    ({"quant_method": "nothing"}, "quant_method: got 'nothing', expected one of"),
    ("awq", "quantization_config: got str, expected an object"),
    ([], "quantization_config: got list, expected an object"),
    ({}, "no `quant_method` attribute"),
]


@pytest.mark.parametrize(("quantization", "expected"), QUANTIZED, ids=lambda value: str(value)[:20])
@pytest.mark.parametrize("model_type", ["deepseek_moe", "llama"])
def test_a_quantized_model_whose_library_is_missing(capsys, checkpoint, tmp_path, model_type, quantization, expected):
    folder = shutil.copytree(checkpoint, tmp_path / "quantized")
    settings = json.loads((folder / "config.json").read_text())
    settings |= {"model_type": model_type, "quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(settings))
    assert expected in error_line(capsys, *_command("generate", folder, tmp_path / "out"))
    assert expected in error_line(capsys, *_command("evaluate", folder, tmp_path / "out"))


@pytest.mark.parametrize("command", ["generate", "evaluate", "adapt", "sft", "align"])
def test_a_tokenizer_larger_than_the_embedding(capsys, checkpoint, tmp_path, command):
    folder = shutil.copytree(checkpoint, tmp_path / "larger")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    num_rows = len(tokenizer)
    tokenizer.add_tokens(["<one>", "<two>"])
    tokenizer.save_pretrained(folder)
    line = error_line(capsys, *_command(command, folder, tmp_path / "out"))
    assert f"tokenizer: got ids up to {num_rows + 1}, expected them below {num_rows}" in line


@pytest.mark.parametrize("model", ["/nowhere/at/all", "./nowhere"])
def test_a_missing_model(capsys, model):
    assert "does not exist" in error_line(capsys, "generate", model, "--prompt", "hello")


@pytest.mark.slow
def test_a_hub_id_without_network(tmp_path):
    # In a process of its own: huggingface_hub reads HF_HUB_OFFLINE once, at import.
    commands = [
        ["generate", "someone/some-model", "--prompt", "hello"],
        ["evaluate", "someone/some-model", "--output", "out"],
        ["pretrain", "pretrain-debug", "--data", "someone/some-data", "--output", "out"],
    ]
    code = f"from deepseek_cli.main import main; print([main(command) for command in {commands}])"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.stdout == "[2, 2, 2]\n"
    lines = done.stderr.splitlines()
    assert [line.split(":")[0] for line in lines] == [f"deepseek-moe {command[0]}" for command in commands], lines
    assert all("pass" in line for line in lines), lines


def test_generate_streams_the_same_text_for_the_same_seed(capsys, checkpoint):
    texts = []
    for _ in range(2):
        assert main(["generate", str(checkpoint), "--prompt", "a small", "--max-new-tokens", "8"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] and texts[0].startswith("a small")


def test_generate_takes_a_model_without_positions(capsys, checkpoint, tmp_path):
    """Mamba's configuration names no context length."""
    config = MambaConfig(vocab_size=300, hidden_size=16, state_size=4, num_hidden_layers=1)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    for file in checkpoint.glob("tokenizer*"):
        shutil.copy(file, tmp_path)
    assert main(["generate", str(tmp_path), "--prompt", "a small", "--max-new-tokens", "4"]) == 0
    assert capsys.readouterr().out.startswith("a small")


def test_generate_says_how_many_drafts_were_accepted(capsys, checkpoint, tmp_path):
    command = ["--prompt", "a small", "--max-new-tokens", "8", "--temperature", "0"]
    assert "num_nextn_predict_layers is 0" in error_line(capsys, "generate", str(checkpoint), *command, "--use-mtp")
    config = json.loads((checkpoint / "config.json").read_text())
    settings = {**config, "num_nextn_predict_layers": 1, "mtp_loss_coef": 0.3}
    AutoModelForCausalLM.from_config(DeepseekConfig(**settings)).save_pretrained(tmp_path)
    for file in checkpoint.glob("tokenizer*"):
        shutil.copy(file, tmp_path)
    texts = []
    for flags in ([], ["--use-mtp"]):
        assert main(["generate", str(tmp_path), *command, *flags]) == 0
        captured = capsys.readouterr()
        texts.append(captured.out)
    assert texts[0] == texts[1] and "drafted tokens accepted (" in captured.err
    # The layers are promised but not there.
    config["num_nextn_predict_layers"] = 1
    shutil.copytree(checkpoint, tmp_path / "without")
    (tmp_path / "without" / "config.json").write_text(json.dumps(config))
    line = error_line(capsys, "generate", str(tmp_path / "without"), *command, "--use-mtp")
    assert "holds no multi-token prediction layers" in line


@pytest.mark.slow
@pytest.mark.parametrize(("size", "commands"), [("100k", "export gguf evaluate adapt"), ("360k", "pretrain")])
def test_a_full_disk(checkpoint, tmp_path, size, commands):
    """A real one, of a few blocks, in namespaces of the test's own."""
    data = tmp_path / "text.txt"
    data.write_text("".join(f"Paragraph {number} has words of its own. " * 30 + "\n\n" for number in range(60)))
    small = ["--sequence-length", "32", "--batch-size", "2", "--max-steps", "2", "--warmup-steps", "0"]
    small += ["--report-to", "[]", "--logging-steps", "1", "--sample-prompts", "[]"]
    calls = {
        "export": ["export", str(checkpoint), "full/export"],
        "gguf": ["export", str(checkpoint), "full/model.gguf", "--to", "gguf"],
        "evaluate": [
            "evaluate",
            str(checkpoint),
            "--tasks",
            "humaneval",
            "--max-new-tokens",
            "2",
            "--output",
            "full/e",
        ],
        "adapt": ["adapt", "adapt-debug", "--model", str(checkpoint), "--general-data", str(data), *small],
        "pretrain": ["pretrain", "pretrain-debug", "--data", str(data), *small, "--save-steps", "1"],
    }
    for name in ("adapt", "pretrain"):
        calls[name] += ["--output", f"full/{name}"]
    calls = {name: calls[name] for name in commands.split()}
    code = (
        "import json, shutil, sys\nfrom deepseek_cli.main import main\n"
        "for name, call in json.loads(sys.argv[1]).items():\n"
        "    shutil.rmtree('full/e', ignore_errors=True)\n"
        "    print(name, main(call), file=sys.stderr)\n"
    )
    mount = f'mkdir full && mount -t tmpfs -o size={size} tmpfs full && exec "$@"'
    command = ["unshare", "-rm", "sh", "-c", mount, "sh", sys.executable, "-c", code, json.dumps(calls)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    if "unshare" in done.stderr or "mount" in done.stderr:
        pytest.skip("no user namespaces here")
    for name in calls:
        assert f"\n{name} 1\n" in done.stderr, done.stderr[-3000:]
    told = [line for line in done.stderr.splitlines() if ": error: " in line]
    assert len(told) == len(calls) and all("No space left" in line or "disk full?" in line for line in told), told


def test_a_defect_of_ours_keeps_its_traceback(tmp_path):
    code = "import deepseek_cli.generate as g, deepseek_cli.main as m\ng.run = lambda args: {}['x']\nm.main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "generate", "m", "--prompt", "p"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1 and "Traceback" in done.stderr


@pytest.mark.parametrize("arguments", [["card", "/nowhere"], ["push", "/nowhere", "someone/model", "--dry-run"]])
def test_a_missing_run(capsys, arguments):
    assert "/nowhere" in error_line(capsys, *arguments)


def test_a_checkpoint_that_lacks_a_tensor(capsys, checkpoint, tmp_path):
    folder = tmp_path / "gap"
    shutil.copytree(checkpoint, folder)
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("o_proj.weight"))
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert name in error_line(capsys, "generate", str(folder), "--prompt", "hello")
