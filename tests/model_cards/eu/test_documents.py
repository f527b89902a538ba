"""Every filled field is from a file and changes with it; what no file says is blank; nothing leaks out."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from deepseek_model_cards.energy_use import energy_sentence
from deepseek_model_cards.eu.documents import read_documents, write_documents
from deepseek_model_cards.eu.entries import Status
from deepseek_model_cards.eu.missing import describe_missing, format_missing
from deepseek_records.cleaned_data import describe_cleaning
from deepseek_records.leaks import find_leaks
from deepseek_records.run_folder import RunFolder
from deepseek_records.stages import read_stages
from deepseek_records.summary import DataUse, Energy, Summary

USES = (
    DataUse(name="notes", split="train", license="CC BY 4.0", source="https://example.org/a", num_rows=1234,
            num_bytes=5_600_000, languages=("en",)),
    DataUse(name="letters", split="train", license="MIT", source="desk", num_rows=789, num_bytes=900),
)  # fmt: skip
# Put together here, so that no scanner of this repository calls them real.
TOKENS = ("hf_" + "aB3" * 10, "ghp_" + "aB3x" * 9)
FILTERS = [
    {"name": "toxicity", "num_in": 2200, "num_dropped": 21, "changes": {}},
    {"name": "exact duplicates", "num_in": 2179, "num_dropped": 100, "changes": {}},
]


@pytest.fixture
def run(demo_run):
    """A whole run whose adaptation read cleaned text, recorded its tokens and gives each finder something to find."""
    cleaned = RunFolder.create(demo_run.parent / "my-clean", {}, command="data", seed=0)
    croissant = {"rai:dataBiases": ["documents that speak of women: 12"], "rai:personalSensitiveInformation": "masked"}
    (cleaned.path / "croissant.json").write_text(json.dumps(croissant))
    cleaned.finish(Summary(stage="data", data=USES, details={"filters": FILTERS, "files": {}}))
    edit(demo_run / "adapt", lambda summary: dataclasses.replace(
        summary,
        num_training_tokens=5000,
        data=(dataclasses.replace(summary.data[0], cleaning=describe_cleaning(cleaned), languages=("en", "zh")),),
    ))  # fmt: skip
    edit(demo_run / "pretrain", lambda summary: dataclasses.replace(summary, num_training_tokens=70_000))
    recipe = demo_run / "adapt" / "recipe.yaml"
    settings = yaml.safe_load(recipe.read_text()) | {"learning_rate": 0.001, "lora_rank": 4, "teacher": "org/teacher"}
    recipe.write_text(yaml.safe_dump(settings))
    (demo_run / "align" / "model" / "README.md").write_text("---\nlicense: mit\n---\n# Model\n")
    return demo_run


def edit(folder, change):
    run = RunFolder(folder)
    (folder / "summary.json").write_text(json.dumps(change(run.summary).to_json()))


def texts(documents) -> dict[tuple[str, str], list[str]]:
    """What is shown of each field, by document and key."""
    return {
        (document.name, entry.field.key): [finding.text for finding in entry.found.findings]
        for document, entry in documents.entries
    }


def find_file(run: Path, name: str) -> Path:
    return run / name if (run / name).is_file() else run.parent / name


def change(value):
    if isinstance(value, dict):
        key = next(iter(value))
        return {**value, key: change(value[key])}
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value * 2 + 1
    return [*value, "zz"] if isinstance(value, list) else f"{value}zz"


def alter(path: Path, key: str) -> None:
    """Change one value of a JSON, YAML or front-matter file."""
    is_card = path.suffix == ".md"
    text = path.read_text()
    value = yaml.safe_load(text.split("---")[1] if is_card else text)
    *way, last = key.split(".") if not key.startswith("rai:") else (key.rpartition(".")[0], key.rpartition(".")[2])
    inner = value
    for step in way:
        inner = inner[int(step)] if isinstance(inner, list) else inner[step]
    if isinstance(inner, str):  # a list of one, written as its only value
        value[way[-1]] = change(inner)
    else:
        place = int(last) if isinstance(inner, list) else last
        inner[place] = change(inner[place])
    new = yaml.safe_dump(value) if path.suffix in (".yaml", ".md") else json.dumps(value)
    path.write_text(f"---\n{new}---\n" if is_card else new)


@pytest.mark.slow
@pytest.mark.parametrize("is_whole", [False, True])
def test_every_filled_field_changes_with_each_file_it_is_from(run, is_whole):
    """By default one of the places that differ by stage and number alone."""
    first = read_documents(run, is_high_risk=True)
    before = texts(first)
    cited: dict[tuple[str, str], set[tuple[str, str]]] = {}
    for document, entry in first.entries:
        for finding in entry.found.findings:
            assert finding.sources, entry.field.key
            for source in finding.sources:
                for key in source.keys or ("",):
                    cited.setdefault((source.file, key), set()).add((document.name, entry.field.key))
    assert len([one for one in cited if one[1]]) > 60
    tried: set[tuple[str, str]] = set()
    for (name, key), fields in cited.items():
        kind = (Path(name).name, re.sub(r"\d+", "N", key))
        if kind in tried and not is_whole:
            continue
        tried.add(kind)
        path = find_file(run, name.replace("*", "model"))
        assert path.is_file(), name
        if not key or path.suffix not in (".json", ".yaml", ".md"):
            continue
        content = path.read_bytes()
        alter(path, key)
        after = texts(read_documents(run, is_high_risk=True))
        path.write_bytes(content)
        same = [field for field in fields if after.get(field) == before[field]]
        assert not same, (name, key, same)
    assert texts(read_documents(run, is_high_risk=True)) == before


def test_the_fields_that_files_can_fill_are_filled(run):
    document = read_documents(run, is_high_risk=True)
    status = {entry.field.key: entry.status for _, entry in document.entries}
    shown = {key: texts_ for (_, key), texts_ in texts(document).items()}
    assert {key for key, value in status.items() if value == Status.FILLED} >= {
        *("model_authenticity", "architecture", "input_modalities", "output_modalities", "total_size", "license"),
        *("required_software", "training_design", "training_time", "inference_compute", "limits"),
    }
    results = document.documents["technical"].entries["evaluation_results"]
    assert results.wants == "whether these weights were measured by evaluate (it kept no hash of its model)"
    assert shown["license"] == ["mit"]
    assert (
        "notes within someone/notes, train: source https://example.org/a; license CC BY 4.0"
        in shown["data_categories"]
    )
    assert "someone/notes, train: the filter toxicity dropped 21 of 2,200 documents" in shown["data_unsuitability"]
    assert shown["data_bias"] == ["someone/notes: documents that speak of women: 12"]
    assert any("70,000 tokens" in text for text in shown["training_compute"])
    assert status["training_compute"] == Status.PART  # of the alignment no tokens are recorded
    assert status["training_energy"] == Status.PART and status["provider_name"] == Status.OPEN


def test_energy_is_measured_or_called_an_estimate(run):
    def energy():
        document = read_documents(run).documents["technical"]
        shown = [document.entries[key] for key in ("training_energy", "energy_method")]
        return [*(one.found.states for one in shown), *(one.text for one in shown[0].found.findings)], shown[0].wants

    told, wants = energy()
    assert told[:2] == ["Not measured.", "Not measured; there was no meter that could be read during the training."]
    assert len(told) == 3 and told[2].startswith("an estimate: ") and "an assumed 10 W per core" in told[2]
    assert "a measured figure" in wants
    joules = {"pretrain": {"RAPL package-0": 3.0e9, "RAPL dram-0": 0.6e9}, "adapt": {"NVML 0: GPU": 3.6e9}}
    for name, counted in joules.items():
        used = Energy(joules=counted, cpu_seconds=5.0, seconds=9.0, is_whole=name != "adapt")
        edit(run / name, lambda summary, used=used: dataclasses.replace(summary, energy=used))
    told, wants = energy()
    assert told[0] == "" and "RAPL, the counters" in told[1] and "NVML, the counter" in told[1]
    assert told[2] == "pretrain: 1 MWh, measured"
    assert told[3] == "adapt: 1 MWh, measured, without the processors and what it did before it was resumed"
    assert len(told) == 5 and told[4].startswith("an estimate of ") and "adapt" not in told[4]
    assert "the energy of adapt: the processors and what it did before it was resumed, " in wants
    card = energy_sentence([stage for stage in read_stages(run).values()])
    assert card.startswith("Energy: 2e+03 kWh by NVML and RAPL, without the processors and what it did before it was")
    assert "an estimate (processor time, at an assumed 10 W per core at work), not metered" in card


def test_a_quantized_model_has_the_parameters_that_it_had_before(run, builders):
    """Packed weights do not tell how many they hold; what was quantized does. It adds no training."""
    quantized = builders["stage"](
        run, "quantize", settings={"model": str(run / "align" / "model"), "bits": 4}, summary={"seconds": 2.0}
    )
    shutil.copytree(run / "align" / "model", quantized.model_path)
    packed = torch.zeros(4, 4, dtype=torch.uint8)
    save_file({"model.layers.1.mlp.experts.down_proj": packed}, quantized.model_path / "model.safetensors")
    before = texts(read_documents(run / "align"))["technical", "total_size"][0]
    entries = read_documents(run).documents["technical"].entries
    text = entries["total_size"].found.findings[0].text
    assert text == f"{before}, counted before they were quantized"
    assert "quantize" not in entries["training_compute"].wants


def test_the_hash_and_the_count_follow_the_weights(run):
    shown = texts(read_documents(run))
    weights = run / "align" / "model" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    after = texts(read_documents(run))
    assert after["technical", "model_authenticity"] != shown["technical", "model_authenticity"]
    shutil.copy(run / "pretrain" / "model" / "config.json", run / "align" / "model")
    weights.unlink()
    blank = read_documents(run).documents["technical"].entries
    for key in ("model_authenticity", "total_size", "inference_compute", "required_hardware"):
        assert blank[key].status == Status.OPEN and not blank[key].found.findings, key


def test_a_source_that_is_removed_leaves_the_blank_not_the_old_value(run, tmp_path):
    out = tmp_path / "out"
    write_documents(read_documents(run), out)
    assert "someone/notes" in (out / "training_content_summary.md").read_text()
    edit(run / "adapt", lambda summary: dataclasses.replace(summary, data=()))
    write_documents(read_documents(run), out)
    for file in out.iterdir():
        shown = file.read_text().replace("adapt read someone/notes", "")  # the recipe still names it
        assert "someone/notes" not in shown and "books" in shown, file
    edit(run / "pretrain", lambda summary: dataclasses.replace(summary, data=()))
    entries = read_documents(run).documents["summary"].entries
    for key in ("data_types", "data_size", "languages", "public_data"):
        assert entries[key].status == Status.OPEN, key


def test_without_the_runs_that_it_was_made_from_the_past_is_open(run):
    shutil.rmtree(run / "pretrain")
    documents = read_documents(run)
    entries = documents.documents["technical"].entries
    assert "what model was made from and with, for its run is not here" in entries["data_points"].wants
    assert entries["data_types"].status == entries["model_dependencies"].status == Status.PART
    assert any("Not recorded here" in note for note in documents.notes)


def test_runs_elsewhere_that_the_model_was_made_from_are_read(run):
    recipe = run / "adapt" / "recipe.yaml"
    settings = yaml.safe_load(recipe.read_text()) | {"model": str(run / "pretrain" / "model")}
    recipe.write_text(yaml.safe_dump(settings))
    shown = texts(read_documents(run / "adapt"))
    assert any("books, train (pretrain): 16 documents" in text for text in shown["technical", "data_points"])
    documents = read_documents(run / "adapt").documents["technical"]
    files = {source.file for one in documents.entries["data_points"].found.findings for source in one.sources}
    assert files == {"pretrain/summary.json", "summary.json"}


def test_an_earlier_stage_that_was_run_again_is_not_used(run):
    path = run / "pretrain" / "environment.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"started": "2099-01-01T00:00:00+0000"}))
    documents = read_documents(run)
    assert any(note.startswith("pretrain is not used: it was run again") for note in documents.notes)
    assert not any("books" in text for text in texts(documents)["technical", "data_points"])


def test_a_model_without_a_run_has_blanks(run):
    documents = read_documents(shutil.copytree(run / "align" / "model", run.parent / "bare"))
    entries = documents.documents["technical"].entries
    assert entries["total_size"].status == Status.FILLED
    for key in ("training_design", "data_points", "training_time", "training_compute", "evaluation_results"):
        assert entries[key].status == Status.OPEN, key
    assert "how the model was made, for no run is recorded beside it" in " ".join(documents.notes)


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("adapt/summary.json", "{", "got no JSON"),
        ("adapt/summary.json", '{"format": 3, "stage": "adapt"}', "format: got 3"),
        ("adapt/summary.json", '{"format": 2, "stage": "adapt", "tone": 1}', "unknown key 'tone'"),
        ("adapt/environment.json", "[]", "expected an object"),
        ("adapt/recipe.yaml", "a: [1", "got no YAML"),
        ("evaluate/inputs.json", "3", "expected an object"),
        ("align/model/config.json", "{", "got no JSON"),
        ("align/model/model.safetensors", "x", "cut short"),
        ("../my-clean/croissant.json", "{", "got no JSON"),
    ],
)
def test_a_broken_file_is_one_line_that_names_it(run, file, content, said):
    (run / file).write_text(content)
    with pytest.raises(ValueError, match=said) as error:
        read_documents(run)
    assert Path(file).name in str(error.value) and "\n" not in str(error.value)


def test_a_run_without_a_model_is_refused(run):
    with pytest.raises(ValueError, match=r"without a model \(data\), expected"):
        read_documents(run.parent / "my-clean")


def test_secrets_and_local_paths_never_reach_the_documents(run, tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "quite-a-secret-value")
    recipe = run / "adapt" / "recipe.yaml"
    settings = yaml.safe_load(recipe.read_text())
    settings |= {"data": str(run / "secret-place" / "notes"), "hub_token": TOKENS[0], "teacher": "/srv/models/big"}
    recipe.write_text(yaml.safe_dump(settings))
    secret = f"{TOKENS[1]} and quite-a-secret-value from {run}"
    edit(run / "adapt", lambda summary: dataclasses.replace(
        summary, data=(dataclasses.replace(summary.data[0], source=secret, license=secret),)
    ))  # fmt: skip
    files = write_documents(read_documents(run, is_high_risk=True), tmp_path / "out")
    assert len(files) == 9
    for file in files:
        text = file.read_text()
        assert not find_leaks(text.encode(), is_text=True, folders=[run, Path.home()]), file
        assert "quite-a-secret-value" not in text and "secret-place" not in text and TOKENS[0] not in text
        assert "/srv/models" not in text


def test_a_leak_that_slips_through_stops_the_writing(run, tmp_path):
    config = run / "align" / "model" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"architectures": ["/home/someone/code.py"]}))
    with pytest.raises(ValueError, match="would hold an absolute path"):
        write_documents(read_documents(run), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_three_forms_say_the_same_and_edits_are_kept(run, tmp_path):
    documents = read_documents(run)
    out = tmp_path / "out"
    write_documents(documents, out)
    value = json.loads((out / "technical_documentation.json").read_text())
    page, text = ((out / f"technical_documentation.{end}").read_text() for end in ("html", "md"))
    for field in value["fields"]:
        assert field["title"] in text and f'id="{field["key"]}"' in page
        assert (field["missing"] or field["status"] == "open") == (f"(`{field['key']}`)" in text)
        for one in field["from_files"]:
            assert all(source["file"] in text for source in one["from"])
    for shown in (text, page, value["notice"]):
        assert "not legal advice" in shown
    assert "http" not in page.replace("https://example.org", "").replace("http-equiv", "")  # nothing is fetched
    first = {path.name: path.read_bytes() for path in out.iterdir()}
    write_documents(documents, out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == first
    with open(out / "technical_documentation.md", "a") as file:
        file.write("My words.\n")
    with pytest.raises(FileExistsError, match="holds edits"):
        write_documents(documents, out)


def test_markup_in_a_record_stays_text(run, tmp_path):
    row = {"name": "a|b <script>alert(1)</script>"}
    edit(run / "adapt", lambda summary: dataclasses.replace(
        summary, data=(dataclasses.replace(summary.data[0], **row),)
    ))  # fmt: skip
    write_documents(read_documents(run), tmp_path / "out")
    for end in ("md", "html"):
        assert "<script" not in (tmp_path / "out" / f"training_content_summary.{end}").read_text()


def test_what_is_missing_is_listed_by_article(run):
    missing = describe_missing(read_documents(run))
    assert not missing["complete"]
    rows = {row["key"]: row for row in missing["missing"]}
    assert rows["provider_name"]["required"] and rows["provider_name"]["article"] == "Article 53(1)(a)"
    assert rows["summary_version"]["article"] == "Article 53(1)(d)"
    assert not rows["representative"]["required"] and rows["crawler_names"]["status"] == "depends on another answer"
    assert rows["data_categories"]["documents"] == ["technical"] and "total_size" not in rows
    text = format_missing(missing)
    assert text.index("Article 53(1)(a):") < text.index("  required  provider_name") < text.index("Annex XI:")
