import dataclasses
import json

import pytest

from deepseek_records.environment import Environment, Machine
from deepseek_records.run_folder import RunFolder
from deepseek_records.stages import read_stages
from deepseek_records.summary import (
    Benchmark,
    Check,
    Cleaning,
    CleaningFilter,
    CleaningSource,
    DataUse,
    Energy,
    Gain,
    Published,
    Result,
    Sample,
    Summary,
)
from deepseek_records.typed_json import from_json, to_json

CLEANING = Cleaning(
    run="runs/clean",
    sources=(CleaningSource(name="notes", split="train", license="mit", num_rows=3, num_bytes=9, languages=("en",)),),
    filters=(CleaningFilter(name="quality", num_in=4, num_dropped=1),),
)
FULL = Summary(
    stage="align",
    results=(
        Result(metric="reward", value=0.4, stderr=0.01, n=64, dataset="dialogues", split="validation", when="before"),
        Result(metric="acc", value=1, dataset="mmlu", task="mmlu", num_fewshot=0, chance=0.25, does_not_show="much"),
        Result(
            metric="pass@1",
            value=0.5,
            interval=(0.2, 0.8),
            num_all=164,
            label="HumanEval",
            metric_label="pass@1",
            measures="code",
            is_safety=True,
            is_share=True,
            higher_is_better=True,
            benchmark=Benchmark(hub_id="a/b", name="B", config="all", task_id="b"),
            published=(Published(by="the article", value=0.7, remark="5-shot"),),
        ),
        Result(metric="bits_per_byte", value=2.1, baseline=2.4, baseline_name="bigram", num_tokens=9, num_bytes=20),
    ),
    data=(
        DataUse(name="books", license="public domain", num_rows=3, num_bytes=99, languages=("en", "zh")),
        DataUse(name="me/notes", hub_id="me/notes", used_for="evaluation", cleaning=CLEANING),
    ),
    checks=(
        Check.compare("falls", -0.1, "<", 0.0, metric="kl", dataset="books"),
        Check(name="x", value=1, passed=False),
    ),
    samples=(Sample(prompt="a", completion="b", when="after"), Sample(prompt="a", completion="c", step=4)),
    seconds=12.5,
    base_model="me/base",
    num_training_tokens=1000,
    gain=Gain(value=0.1, stderr_paired=0.01, stderr_unpaired=None, n=64),
    tokens_per_expert=((3, 4.5), (0, 7)),
    energy=Energy(
        joules={"RAPL package-0": 12.5},
        cpu_seconds=3.25,
        seconds=4.5,
        num_processes=4,
        num_machines=2,
        is_whole=False,
    ),
    details={"columns": {"reward": [0.1, None, "any"]}},
)
# As an evaluation, an adaptation and a benchmark wrote it before the format had a number.
OLD = (
    {
        "stage": "evaluate",
        "model": "runs/demo/align/model",
        "results": [
            {"metric": "acc", "dataset": "cais/mmlu", "split": "test", "value": 0.29, "stderr": None, "n": 114}
            | {"task": "mmlu", "num_fewshot": 0, "harness": "deepseek-moe"}
        ],
        "data": [{"name": "cais/mmlu", "licence": "MIT", "source": "x", "split": "test", "used_for": "evaluation"}],
        "checks": [],
        "samples": [],
        "seconds": 29.01,
    },
    {
        "stage": "adapt",
        "base_model": "runs/demo/pretrain/model",
        "results": [{"metric": "bits_per_byte", "dataset": "books", "value": 2.0, "stderr": 0.01, "when": "before"}],
        "data": [{"name": "books", "licence": "public domain", "num_rows": 16, "num_bytes": 40, "language": "en"}],
        "checks": [{"name": "falls", "value": -0.3, "bound": -0.08, "comparison": "<=", "passed": True}],
        "samples": [{"prompt": "The patient", "completion": "'s end."}],
        "seconds": 105.5,
        "replay_share": 0.4,
        "tokens_per_expert": [[3986, 3769], [4502, 4084]],
    },
    {"columns": {"reward": [0.1, 0.2]}, "curve": []},
)


def places(value, path=()):
    """Every place in a JSON value that holds a text, a number or a truth value."""
    if isinstance(value, dict | list):
        inner = value.items() if isinstance(value, dict) else enumerate(value)
        for key, child in inner:
            yield from places(child, (*path, key))
    elif value is not None:
        yield path


def change(value, path, new):
    """A copy of a JSON value with another one in one place."""
    copy = json.loads(json.dumps(value))
    place = copy
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = new
    return copy


def write_as(path):
    """A place as the error writes it: results[2].value."""
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path).removeprefix(".")


def test_a_summary_comes_back_as_it_was():
    assert Summary.from_json(json.loads(json.dumps(FULL.to_json()))) == FULL
    for kind in (Result, DataUse, Check, Sample, Gain, Energy, Summary):  # Every field was filled somewhere above.
        unfilled = {field.name for field in dataclasses.fields(kind)}
        for record in (*FULL.results, *FULL.data, *FULL.checks, *FULL.samples, FULL.gain, FULL.energy, FULL):
            if isinstance(record, kind):
                unfilled -= set(to_json(record))
        assert unfilled <= {"prompt_style", "harness", "command", "model", "num_parameters", "vocab_size"} | {
            *("replay_share", "source", "split", "stderr_unpaired")
        }


def test_a_value_of_another_type_is_named_with_its_place_wherever_it_stands():
    whole = FULL.to_json()
    wrong = {"a list": [], "an object": {}}
    tried = 0
    for path in places(whole):
        if path[0] in ("format", "details"):
            continue
        for new in wrong.values():
            with pytest.raises(ValueError) as caught:
                Summary.from_json(change(whole, path, new), "runs/a/summary.json")
            message = str(caught.value)
            assert message.startswith(f"runs/a/summary.json: {write_as(path)}: got {json.dumps(new)}, expected ")
            assert "\n" not in message
            tried += 1
    assert tried > 60


@pytest.mark.parametrize(
    ("path", "new", "message"),
    [
        (("results", 2, "value"), "2.1", 'results[2].value: got "2.1", expected a number'),
        (("results", 2, "value"), True, "results[2].value: got true, expected a number"),
        (("results", 0, "n"), 64.5, "results[0].n: got 64.5, expected a whole number"),
        (("results", 0, "when"), "later", "results[0].when: got \"later\", expected 'before' or 'after'"),
        (("results", 0, "value"), float("nan"), "results[0].value: got nan, expected a finite number"),
        (("checks", 0, "passed"), "yes", 'checks[0].passed: got "yes", expected true or false'),
        (("tokens_per_expert", 1, 0), "x", 'tokens_per_expert[1][0]: got "x", expected a number'),
        (("results",), "none", 'results: got "none", expected a list'),
        (("data", 0), 3, "data[0]: got 3, expected an object"),
        (("format",), 9, "format: got 9, expected 1 or 2; a newer version may read it"),
    ],
)
def test_a_hand_edited_file_is_told_in_one_line(path, new, message):
    with pytest.raises(ValueError) as caught:
        Summary.from_json(change(FULL.to_json(), path, new))
    assert str(caught.value) == f"summary.json: {message}"


def test_unknown_and_missing_keys_are_told_with_the_nearest():
    whole = FULL.to_json()
    with pytest.raises(ValueError, match=r"summary\.json: results\[0\]: got the unknown key 'valeu', .*mean value\?"):
        Summary.from_json(change(whole, ("results", 0, "valeu"), 1))
    with pytest.raises(ValueError, match=r"summary\.json: got the unknown key 'result', .*; did you mean results\?"):
        Summary.from_json({**whole, "result": []})
    del whole["results"][1]["value"]
    with pytest.raises(ValueError, match=r"summary\.json: results\[1\]: got no value, expected one"):
        Summary.from_json(whole)


@pytest.mark.parametrize("old", OLD, ids=["evaluate", "adapt", "bench"])
def test_summaries_written_before_the_format_had_a_number_are_read(tmp_path, old):
    run = RunFolder.create(tmp_path / "run", {"a": 1}, command="old")
    (run.path / "summary.json").write_text(json.dumps(old))
    summary = run.summary
    assert len(summary.results) == len(old.get("results", ()))
    assert [row.value for row in summary.results] == [row["value"] for row in old.get("results", ())]
    assert [row.license for row in summary.data] == [row["licence"] for row in old.get("data", ())]
    assert [row.languages for row in summary.data] == [("en",) if "language" in r else () for r in old.get("data", ())]
    assert dict(summary.details) == {key: old[key] for key in ("columns", "curve") if key in old}
    assert read_stages(run.path)[old.get("stage", "old")].is_finished


def test_what_cannot_be_read_back_is_not_written(tmp_path):
    run = RunFolder.create(tmp_path / "run", {"a": 1}, command="test")
    broken = dataclasses.replace(FULL, results=(Result(metric="acc", value=float("nan")),))
    with pytest.raises(ValueError, match=r"results\[0\]\.value: got nan, expected a finite number"):
        run.finish(broken)
    assert not run.is_finished


def test_a_check_compares_as_its_sign_says():
    signs = {
        "<": (True, False, False),
        "<=": (True, True, False),
        ">": (False, False, True),
        ">=": (False, True, True),
    }
    for sign, expected in signs.items():
        assert tuple(Check.compare("x", value, sign, 1.0).passed for value in (0.5, 1.0, 2.0)) == expected
    assert Summary(stage="x", checks=(Check.compare("a", 1, "<", 0), Check.compare("b", 1, ">", 0))).missed == ("a",)


def test_an_environment_comes_back_as_it_was():
    whole = Environment(
        command="align",
        argv=("deepseek-moe", "align"),
        seed=0,
        versions={"torch": "2"},
        machine=Machine(gpus=("H100",)),
    )
    assert from_json(Environment, json.loads(json.dumps(to_json(whole))), "environment.json") == whole
    with pytest.raises(ValueError, match=r'environment\.json: machine\.num_cpus: got "2", expected a whole number'):
        from_json(Environment, {"machine": {"num_cpus": "2"}}, "environment.json")
