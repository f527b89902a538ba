"""A run folder with plausible but clearly synthetic values, and real tiny checkpoints in it.

No number here was measured. The figures are chosen so that each case a reader must handle occurs: a metric with and
without error, before and after, a baseline, a missed check, a benchmark at chance, a Hub data set, local paths.
"""

import math
from pathlib import Path

import pytest

from deepseek_records.run_folder import RunFolder
from deepseek_records.summary import Benchmark, Check, DataUse, Result, Sample, Summary

HOME = "/home/someone/projects"
# What the tasks say of themselves. Unlike in the catalogue, both are registered benchmarks here.
MMLU = {
    "task": "mmlu",
    "label": "MMLU",
    "metric_label": "accuracy",
    "measures": "knowledge",
    "chance": 0.25,
    "benchmark": Benchmark(hub_id="cais/mmlu", name="MMLU", config="all", task_id="mmlu_all"),
}
HUMANEVAL = {
    "task": "humaneval",
    "label": "HumanEval",
    "measures": "code",
    "chance": 0.0,
    "benchmark": Benchmark(hub_id="openai/openai_humaneval", name="HumanEval", task_id="humaneval"),
}


def tiny_checkpoint(path: Path) -> None:
    """Save a real checkpoint of ours with its tokenizer: 2 layers, 1 of them with 4 routed experts (1 to 3 active)."""
    import torch

    from deepseek_training.data.tokenizer import train_tokenizer
    from modeling_deepseek import DeepseekConfig, DeepseekForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 40, "moe_intermediate_size": 24, "num_hidden_layers": 2}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 3, "min_experts_per_tok": 1}
    config = DeepseekConfig.from_preset("debug", vocab_size=300, max_position_embeddings=64, **sizes, **experts)
    DeepseekForCausalLM(config).save_pretrained(path)
    train_tokenizer(["a fox and a crow sat on a wall"] * 4, 300).save_pretrained(path)


def make_stage(
    root: Path, name: str, *, settings: dict, summary: dict | None, metrics: list[dict] | None = None, seed=17
) -> RunFolder:
    run = RunFolder.create(root / name, settings, command=name, seed=seed)
    for row in metrics or []:
        run.log(row)
    if summary is not None:
        run.finish(Summary(**{"stage": name, **{key: as_tuple(value) for key, value in summary.items()}}))
    return run


def as_tuple(value):
    return tuple(value) if isinstance(value, list) else value


def result(metric, dataset, value, *, split="validation", **more) -> Result:
    return Result(metric=metric, dataset=dataset, split=split, value=value, **more)


def make_pretrain(root: Path) -> RunFolder:
    steps = range(0, 200, 10)
    metrics = [{"step": s, "loss": 6.5 * math.exp(-s / 90) + 2.2, "learning_rate": 3e-4} for s in steps]
    metrics += [{"step": s, "eval_books_bits_per_byte": 4.0 * math.exp(-s / 80) + 2.1} for s in range(0, 200, 50)]
    data = DataUse(
        name="books",
        license="public domain",
        source="synthetic",
        split="train",
        num_rows=16,
        num_bytes=4_100_000,
        languages=("en",),
    )
    summary = {
        "results": [
            result("bits_per_byte", "books", 2.41, stderr=0.02, n=120, baseline=3.3, baseline_name="bigram"),
        ],
        "data": [data],
        "checks": [
            Check.compare("below the bigram", 2.41, "<", 3.3),
        ],
        "samples": [Sample(prompt="Once upon a time", completion=" there was a fox & a <crow>.")],
        "seconds": 171.4,
        "tokens_per_expert": [(110, 90, 130, 70)],
    }
    run = make_stage(root, "pretrain", settings={"model": "nano", "data": "books"}, summary=summary, metrics=metrics)
    tiny_checkpoint(run.model_path)
    return run


def make_adapt(root: Path) -> RunFolder:
    metrics = [{"step": s, "loss": 2.6 - s / 400} for s in range(0, 100, 10)]
    summary = {
        "results": [
            result("bits_per_byte", "medicine", 3.1, stderr=0.03, n=80, when="before"),
            result("bits_per_byte", "medicine", 2.5, stderr=0.03, n=80, when="after"),
            result("bits_per_byte", "books", 2.41, stderr=0.02, n=120, when="before"),
            result("bits_per_byte", "books", 2.45, stderr=0.02, n=120, when="after"),
        ],
        "data": [
            DataUse(
                name="someone/notes",
                hub_id="someone/notes",
                license="cc-by-4.0",
                source="huggingface.co/datasets/someone/notes",
                split="train",
                num_rows=1252,
                num_bytes=1_900_000,
            )
        ],
        "checks": [Check.compare("domain falls by 8 %", -0.19, "<=", -0.08)],
        "seconds": 61.0,
    }
    settings = {"model": f"{HOME}/demo/pretrain/model", "data": "someone/notes"}
    run = make_stage(root, "adapt", settings=settings, summary=summary, metrics=metrics)
    tiny_checkpoint(run.model_path)
    return run


def make_align(root: Path) -> RunFolder:
    metrics = [
        {
            "step": s,
            "reward": 0.4 + s / 300,
            "reward_relevance": 0.3 + s / 400,
            "reward_safety": 0.9,
            "reward_diversity": 0.6 - s / 900,
            "kl": s / 50,
            "loss/policy_avg": -s / 1000,
            "loss/value_avg": 0.1 - s / 1000,
        }
        for s in range(0, 60, 5)
    ]
    summary = {
        "results": [
            result("reward", "dialogues", 0.42, stderr=0.011, n=64, when="before"),
            result("reward", "dialogues", 0.58, stderr=0.012, n=64, when="after"),
            result("reward_safety", "dialogues", 0.91, stderr=0.01, n=64, when="after"),
            result("kl", "dialogues", 1.2, n=64, when="after"),
        ],
        "checks": [Check.compare("reward rises by 2 standard errors", 1.1, ">=", 2)],
        "samples": [
            Sample(prompt="How are you?", completion=" the the the", when="before"),
            Sample(prompt="How are you?", completion=" I am well, thank you.", when="after"),
        ],
        "seconds": 99.0,
    }
    run = make_stage(root, "align", settings={"model": f"{HOME}/demo/adapt/model"}, summary=summary, metrics=metrics)
    tiny_checkpoint(run.model_path)
    return run


def make_evaluate(root: Path) -> RunFolder:
    command = "deepseek-moe evaluate model --tasks mmlu,humaneval"
    shots = {"num_fewshot": 0, "command": command, "is_share": True}
    summary = {
        "results": [
            result("acc", "cais/mmlu", 0.263, stderr=0.041, n=114, split="test", **MMLU, **shots),
            result("pass@1", "openai/openai_humaneval", 0.0, stderr=0.0, n=164, split="test", **HUMANEVAL, **shots),
        ],
        "data": [
            DataUse(
                name="mmlu",
                license="MIT",
                source="cais/mmlu",
                split="test",
                num_rows=114,
                hub_id="cais/mmlu",
                used_for="evaluation",
            )
        ],
        "seconds": 66.0,
    }
    return make_stage(root, "evaluate", settings={"model": f"{HOME}/demo/align/model"}, summary=summary)


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory) -> Path:
    """The parent folder of a whole run; read it, do not write into it."""
    root = tmp_path_factory.mktemp("runs") / "demo"
    for make in (make_pretrain, make_adapt, make_align, make_evaluate):
        make(root)
    return root


@pytest.fixture
def demo_run(finished_run, tmp_path) -> Path:
    """A copy of the whole run that a test may write into."""
    import shutil

    return shutil.copytree(finished_run, tmp_path / "demo")


@pytest.fixture(scope="session")
def finished_stage(tmp_path_factory) -> Path:
    """One stage alone with a model in several shards and a benchmark; few charts, so that many tests can afford it."""
    from modeling_deepseek import DeepseekForCausalLM

    row = result("acc", "cais/mmlu", 0.263, stderr=0.041, n=114, split="test", num_fewshot=0, is_share=True, **MMLU)
    settings = {"model": f"{HOME}/demo/adapt/model"}
    run = make_stage(tmp_path_factory.mktemp("stage"), "align", settings=settings, summary={"results": [row]})
    tiny_checkpoint(run.model_path)
    model = DeepseekForCausalLM.from_pretrained(run.model_path)
    (run.model_path / "model.safetensors").unlink()
    model.save_pretrained(run.model_path, max_shard_size="90KB")
    assert len(list(run.model_path.glob("*.safetensors"))) >= 2
    return run.path


@pytest.fixture
def stage_run(finished_stage, tmp_path) -> Path:
    """A copy of the one stage that a test may write into."""
    import shutil

    return shutil.copytree(finished_stage, tmp_path / "align")


@pytest.fixture(scope="session")
def builders():
    """The functions that make one stage each, for tests of incomplete runs."""
    return {
        "pretrain": make_pretrain,
        "adapt": make_adapt,
        "align": make_align,
        "evaluate": make_evaluate,
        "stage": make_stage,
        "result": result,
    }


@pytest.fixture
def hub(monkeypatch):
    """A Hub on this machine, empty, whose endpoint is `hub.url`; the client's plain large-file protocol, no xet."""
    import hub_server
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    hub, server = hub_server.start_hub()
    hub.url = server.url
    yield hub
    server.shutdown()
