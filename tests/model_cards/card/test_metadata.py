import copy

import pytest
import yaml
from huggingface_hub import parse_eval_result_entries
from huggingface_hub.repocard_data import model_index_to_eval_results

from deepseek_model_cards.card.license_facts import License
from deepseek_model_cards.card.metadata import (
    build_metadata,
    check_metadata,
    results_of_final_model,
    write_eval_results,
)
from deepseek_model_cards.card.model_facts import ModelFacts, read_facts
from deepseek_records.lineage import read_lineage
from deepseek_records.summary import Benchmark


@pytest.fixture
def lineage(finished_run):
    return read_lineage(finished_run)


@pytest.fixture
def metadata(lineage):
    return build(lineage, read_facts(lineage.model_path))


def build(lineage, facts=None):
    license = License({"license": "mit"}, "")
    return build_metadata(
        lineage, name="fox", license=license, facts=facts or ModelFacts(), is_made_here=True
    ).to_dict()


def test_only_the_final_models_results_are_claimed(lineage):
    """What was measured before training, or on the way, belongs to another model."""
    claimed = {
        (found.result.metric, found.result.dataset): found.result.value for found in results_of_final_model(lineage)
    }
    assert claimed[("reward", "dialogues")] == 0.58
    assert ("bits_per_byte", "books") not in claimed  # last measured on the adapted model, which is not the final one
    assert claimed[("acc", "cais/mmlu")] == 0.263


def test_the_metadata_survives_yaml_and_the_hubs_own_parser(metadata):
    again = yaml.safe_load(yaml.safe_dump(metadata))
    name, results = model_index_to_eval_results(again["model-index"])
    assert name == "fox"
    mmlu = next(row for row in results if row.dataset_type == "cais/mmlu")
    assert (mmlu.metric_type, mmlu.metric_value, mmlu.dataset_split) == ("acc", 0.263, "test")
    assert mmlu.metric_args == {"stderr": 0.041, "n": 114} and mmlu.dataset_args == {"num_few_shot": 0}


def test_fields_are_read_from_the_run(metadata):
    assert metadata["license"] == "mit" and metadata["library_name"] == "transformers"
    assert metadata["pipeline_tag"] == "text-generation" and metadata["language"] == ["en"]
    assert metadata["datasets"] == ["someone/notes"]  # trained on; cais/mmlu was only evaluated on
    assert {"mixture-of-experts", "custom_code", "ppo", "deepseek_moe"} <= set(metadata["tags"])
    assert "base_model" not in metadata  # it began from nothing; a local path would be no Hub id


def test_a_hub_base_model_is_named_with_its_relation(tmp_path, builders):
    summary = {"base_model": "deepseek-ai/DeepSeek-V2-Lite", "seconds": 1}
    builders["stage"](tmp_path, "adapt", settings={}, summary=summary)
    metadata = build(read_lineage(tmp_path))
    assert metadata["base_model"] == ["deepseek-ai/DeepSeek-V2-Lite"]
    assert metadata["base_model_relation"] == "finetune"


def test_a_quantized_model_stands_so_to_its_base(tmp_path, builders):
    summary = {"base_model": "deepseek-ai/DeepSeek-V2-Lite", "seconds": 1}
    builders["stage"](tmp_path, "quantize", settings={}, summary=summary)
    metadata = build(read_lineage(tmp_path))
    assert metadata["base_model"] == ["deepseek-ai/DeepSeek-V2-Lite"]
    assert metadata["base_model_relation"] == "quantized"


@pytest.mark.parametrize("local", ["runs/demo/pretrain/model", "/srv/models/base", "./base", "model", "here/model"])
def test_a_local_base_model_is_left_out_and_never_fatal(tmp_path, builders, local, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here" / "model").mkdir(parents=True)
    builders["stage"](tmp_path / "run", "adapt", settings={}, summary={"base_model": local, "seconds": 1})
    metadata = build(read_lineage(tmp_path / "run"))
    assert "base_model" not in metadata and "base_model_relation" not in metadata


def test_eval_results_files_read_back_by_the_hubs_own_parser(lineage, tmp_path):
    files = write_eval_results(lineage, tmp_path)
    assert [str(file.relative_to(tmp_path)) for file in files] == [
        *(".eval_results/mmlu.yaml", ".eval_results/openai_humaneval.yaml"),
    ]
    entries = [parse_eval_result_entries(yaml.safe_load(file.read_text()))[0] for file in files]
    assert [entry.dataset_id for entry in entries] == ["cais/mmlu", "openai/openai_humaneval"]
    assert [entry.task_id for entry in entries] == ["mmlu_all", "humaneval"]
    assert entries[0].value == 0.263
    assert all(word in entries[0].notes for word in ("stderr 0.041", "n 114", "0-shot", "chance 0.25"))


@pytest.mark.parametrize(
    "benchmark",
    [None, Benchmark(hub_id="cais/mmlu", name="MMLU")],
    ids=["a part of a benchmark or other data", "not registered on the Hub"],
)
def test_only_a_whole_registered_benchmark_gets_an_eval_results_file(tmp_path, builders, benchmark):
    row = builders["result"]("acc", "cais/mmlu", 0.3, n=114, task="mmlu", benchmark=benchmark)
    builders["stage"](tmp_path, "evaluate", settings={}, summary={"results": [row]})
    assert write_eval_results(read_lineage(tmp_path), tmp_path / "card") == []
    assert not (tmp_path / "card").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"license": "do-what-you-like"}, "license: got 'do-what-you-like', expected"),
        ({"pipeline_tag": "chatting"}, "pipeline_tag"),
        ({"datasets": ["/home/me/data"]}, "datasets: got '/home/me/data', expected a Hub id"),
        ({"base_model": ["a/b/c"]}, "base_model"),
        ({"language": ["English"]}, "language: got 'English'"),
        ({"tags": ["ok", ""]}, "tags"),
    ],
)
def test_what_the_hub_would_refuse_is_refused_here(metadata, change, message):
    with pytest.raises(ValueError, match=message) as error:
        check_metadata({**metadata, **change})
    assert "\n" not in str(error.value)


def test_a_result_that_is_no_number_is_refused(metadata):
    broken = copy.deepcopy(metadata)
    broken["model-index"][0]["results"][0]["metrics"][0]["value"] = "0.58 +/- 0.01"
    with pytest.raises(ValueError, match=r"model-index: .* needs a number"):
        check_metadata(broken)
