"""The measurements' one home: each nested command is listed, explained, light to ask, and refuses bad options."""

import subprocess
import sys

import pytest

from deepseek_cli import bench
from deepseek_cli.benchmarks import attacks, reward_runs, step_cost
from deepseek_cli.main import main

NAMES = [benchmark.name for benchmark in bench.BENCHMARKS]


def stop(capsys, *words):
    with pytest.raises(SystemExit) as stopped:
        main(["bench", *words])
    return stopped.value.code, capsys.readouterr()


def test_all_are_listed(capsys):
    code, printed = stop(capsys, "--help")
    assert code == 0
    assert NAMES == [
        "kernels",
        "compile",
        "step",
        "lora",
        "ppo",
        "experts",
        "rewards",
        "attacks",
        "update",
        "adapt",
        "serving",
        "edge",
        "smaller",
    ]
    assert all(f"\n    {benchmark.name} " in printed.out for benchmark in bench.BENCHMARKS)


@pytest.mark.parametrize("name", NAMES)
def test_each_has_its_own_help_with_examples(name, capsys):
    code, printed = stop(capsys, name, "--help")
    assert code == 0
    options, examples = printed.out.split("examples:")
    assert f"deepseek-moe bench {name}" in examples
    assert f"runs/bench-{name}" in options and "--overwrite" in options


@pytest.mark.parametrize("name", [None, *NAMES])
def test_help_imports_nothing_heavy(name):
    words = ["bench", *([name] if name else []), "--help"]
    code = (
        "import sys\nfrom deepseek_cli.main import main\n"
        f"try:\n    main({words!r})\nexcept SystemExit:\n    pass\n"
        "sys.exit(', '.join({'torch', 'transformers', 'trl', 'numpy', 'datasets'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nonsense"], "invalid choice: 'nonsense'"),
        (["step", "--rounds", "0"], "rounds: got 0, expected at least 1"),
        (["step", "--threads", "0"], "threads: got 0, expected at least 1"),
        (["step", "--rounds", "many"], "invalid int value: 'many'"),
        (["step", "--experts", "7"], "invalid choice: 7"),
        (["ppo", "--rounds", "1"], "rounds: got 1, expected at least 2"),
        (["ppo", "--round", "1"], "rounds: got 1, expected at least 2"),
        (
            ["attacks", "--enkoder", "minilm"],
            "deepseek-moe bench attacks: error: unknown argument --enkoder; did you ",
        ),
        (["attacks", "--encoder", "/nowhere/at/all"], "/nowhere/at/all"),
        (["rewards"], "required: RECIPE"),
        (["rewards", "align-debug", "--model", "/nowhere/at/all"], "/nowhere/at/all"),
        (["rewards", "align-debug", "--model", "m", "--seed", "3"], "seed: got 3, expected none; pass --seeds"),
        (["rewards", "align-debug", "--model", "m", "--seeds", "3", "3"], "seeds: got 3, 3, expected each once"),
        (["rewards", "align-debug", "--model", "m", "--methods", "dpo"], "methods: got 'dpo', expected some of ppo"),
        (["rewards", "align-debug", "--model", "m", "--num-samples", "0"], "num_samples: got 0, expected at least 1"),
        (["rewards", "align-debug", "--model", "m", "--max-kl", "nan"], "max_kl: got nan, expected a number above 0"),
        (["rewards", "align-nowhere", "--model", "m"], "align-nowhere"),
    ],
)
def test_a_bad_option_is_one_line_and_leaves_no_folder(words, message, capsys, tmp_path):
    output = ["--output", str(tmp_path / "run")] if words != ["nonsense"] else []
    try:
        code = main(["bench", *words, *output])
    except SystemExit as stopped:
        code = stopped.code
    lines = capsys.readouterr().err.splitlines()
    assert code == 2 and len(lines) == 1 and message in lines[0]
    assert lines[0].startswith("deepseek-moe bench")
    assert not (tmp_path / "run").exists()


def test_ctrl_c_ends_with_130(monkeypatch, capsys, tmp_path):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(attacks, "measure", interrupted)
    assert main(["bench", "attacks", "--output", str(tmp_path / "run")]) == 130
    assert "deepseek-moe bench attacks: interrupted" in capsys.readouterr().err
    assert not (tmp_path / "run" / "summary.json").exists()


def test_a_finished_run_is_not_overwritten_unasked(monkeypatch, capsys, tmp_path):
    row = {"seconds": {"stock": 2.0, "ours": 1.0}, "best_stock": "stock", "ratios": {"ours": 2.0}}
    monkeypatch.setattr(step_cost, "compare", lambda *_: row)
    words = ["bench", "step", "--experts", "32", "--output", str(tmp_path / "run")]
    assert main(words) == 0
    assert "32 experts: stock 2000 ms, ours 1000 ms; against stock: ours 2.00x" in capsys.readouterr().out
    assert main(words) == 2
    assert "holds a finished run; pass another --output, or --overwrite" in capsys.readouterr().err
    assert main([*words, "--overwrite"]) == 0


def test_the_help_names_every_method():
    assert tuple(reward_runs.METHODS) == bench.METHODS
