"""Sizes are those on disk, differences those of pairs, and what cannot work is refused before anything is written."""

import json

import pytest
from matplotlib import pyplot as plt
from matplotlib.image import imread

from deepseek_cli.benchmarks import smaller_picture, smaller_variants
from deepseek_cli.benchmarks.smaller import Row, format_table, mark_frontier
from deepseek_cli.benchmarks.smaller_variants import BOTH, CUT, HEALED, ORIGINAL, ROUNDED, cut_settings
from deepseek_cli.main import main
from deepseek_records.run_files import find_foreign
from modeling_deepseek import DeepseekConfig


def row(kind, label, megabytes, bits):
    return Row(label, kind, label, int(megabytes * 1e6), bits, bits - 2.0, 0.001, 0.01)


@pytest.fixture
def rows():
    return mark_frontier(
        [
            row(ORIGINAL, "fp32", 6.8, 2.0),
            row(ORIGINAL, "bf16", 3.4, 2.0),
            row(ROUNDED, "nearest", 1.7, 2.0012),
            row(ROUNDED, "AWQ", 1.7, 2.001),
            row(ROUNDED, "AWQ, clipped", 1.7, 2.0014),
            row(CUT, "50 % cut", 2.2, 2.12),
            row(HEALED, "50 % cut", 2.2, 2.01),
            row(BOTH, "50 % cut", 1.4, 2.011),
        ]
    )


def test_the_frontier_holds_what_nothing_beats_in_both(rows):
    assert [one.is_on_frontier for one in rows] == [False, True, False, True, False, False, False, True]
    twins = mark_frontier([row(ORIGINAL, "a", 1.0, 2.0), row(ROUNDED, "b", 1.0, 2.0)])
    assert all(one.is_on_frontier for one in twins), "equals do not beat one another"
    first, *_, last = format_table(rows).splitlines()[2:]
    assert first == "| fp32 | 6.80 | 1.000 | 2.0000 |  |  |  |"
    assert last == "| 50 % cut | 1.40 | 0.206 | 2.0110 | +0.0110 ± 0.0010 | 0.0100 | yes |"


def test_no_label_of_the_picture_hides_another(rows, tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plt, "close", figures.append)
    smaller_picture.draw_picture(rows, tmp_path / "plots" / "smaller.png")
    monkeypatch.undo()
    assert imread(tmp_path / "plots" / "smaller.png").std() > 0.05
    for axis, expected in zip(figures[0].axes, (8, 7), strict=True):
        boxes = [label.get_window_extent() for label in axis.texts]
        assert len(boxes) == expected
        pairs = [(one, other) for number, one in enumerate(boxes) for other in boxes[:number]]
        assert not any(one.overlaps(other) for one, other in pairs)
        frame = axis.get_window_extent()
        assert all(frame.x0 <= box.x0 and box.x1 <= frame.x1 for box in boxes)
    plt.close("all")


def test_a_share_of_the_experts_is_a_setting_of_the_family():
    config = DeepseekConfig.from_preset("debug", n_routed_experts=16)
    assert cut_settings(config, 25) == {"n_routed_experts": 12} and cut_settings(config, 75) == {"n_routed_experts": 4}
    with pytest.raises(ValueError, match="cuts: got 99, expected a share that leaves some of the 16 experts"):
        cut_settings(config, 99)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--cuts", "0"], "cuts: got 0, expected percents between 0 and 100"),
        (["--cuts", "50", "50"], "cuts: got 50, 50, expected each once"),
        (["--cuts", "99"], "cuts: got 99, expected a share that leaves some of the 8 experts"),
        (["--group", "24"], "group_size: got 24, expected a divisor of the experts' "),
        (["--eval-bytes", "10"], "eval_bytes: got 10, expected at least 1000"),
        (["--recipe", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_options_are_checked_before_anything_is_written(policy_path, tmp_path, capsys, options, message):
    words = [str(policy_path), "--group", "16", *options, "--output", str(tmp_path / "run")]
    assert main(["bench", "smaller", *words]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert message in line and not (tmp_path / "run").exists()


def test_a_model_that_is_absent_is_named(tmp_path, capsys):
    assert main(["bench", "smaller", str(tmp_path / "nothing"), "--output", str(tmp_path / "run")]) == 2
    assert "nothing' does not exist" in capsys.readouterr().err and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_every_variant_of_a_tiny_model(policy_path, tmp_path, capsys, monkeypatch):
    """The real command, healing for two steps."""

    def absent():
        raise ValueError("got an environment without onnx")

    monkeypatch.setattr(smaller_variants, "check_onnx_packages", absent)  # tracing takes half a minute
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(
        "teacher: x\ndata: dialogues\nsequence_length: 32\nbatch_size: 4\nmax_steps: 2\nlearning_rate: 1.0e-3\n"
        "calibration_tokens: 256\ncache_top_k: 8\nlogging_steps: 1\nreport_to: []\n"
    )
    words = ["--group", "16", "--cuts", "50", "--recipe", str(recipe), "--calibration-tokens", "256"]
    command = ["bench", "smaller", str(policy_path), *words, "--eval-bytes", "2000", "--output", str(tmp_path / "run")]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "8 bits for onnxruntime: left out, got an environment without onnx" in printed
    found = json.loads((tmp_path / "run" / "results.json").read_text())["rows"]
    by_name = {one["name"]: one for one in found}
    assert list(by_name) == [
        "fp32, the original",
        "bf16",
        "int4 to nearest",
        "int4 by AWQ",
        "int4 by AWQ with clipping",
        "none cut, trained as the healed ones",
        "50 % cut",
        "50 % cut, healed",
        "50 % cut, healed, int4 by AWQ with clipping",
    ]
    original, half, rounded, both = (found[number] for number in (0, 1, 4, 8))
    assert original["num_bytes"] == (policy_path / "model.safetensors").stat().st_size
    assert original["difference"] == original["difference_stderr"] == 0
    assert 0.5 <= half["num_bytes"] / original["num_bytes"] < 0.55  # names take a few kB
    assert both["num_bytes"] < by_name["50 % cut, healed"]["num_bytes"] < half["num_bytes"] > rounded["num_bytes"]
    assert by_name["50 % cut"]["num_bytes"] == by_name["50 % cut, healed"]["num_bytes"]
    for one in found[1:]:
        assert one["difference"] == pytest.approx(one["bits_per_byte"] - original["bits_per_byte"])
        assert one["difference_stderr"] > 0 and one["kl"] > -1e-6
    assert (tmp_path / "run" / "plots" / "smaller.png").is_file()
    assert main(command) == 2
    assert "holds a finished run" in capsys.readouterr().err
    assert find_foreign(tmp_path / "run") is None, "--overwrite deletes the run"
