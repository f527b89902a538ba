"""The provider's answers: written empty, read back, merged, held against files, and refused where they cannot be."""

import dataclasses
import datetime
import json

import pytest
import yaml

from deepseek_model_cards.eu.answers import write_answers
from deepseek_model_cards.eu.documents import read_documents, write_documents
from deepseek_model_cards.eu.entries import Status
from deepseek_model_cards.eu.fields import DOCUMENTS, HIGH_RISK, fields_of
from deepseek_model_cards.eu.missing import describe_missing
from deepseek_records.run_folder import RunFolder


@pytest.fixture
def run(demo_run):
    """A whole run; its data can be looked up, one set on the Hub."""
    path = demo_run / "pretrain" / "summary.json"
    summary = RunFolder(path.parent).summary
    data = (dataclasses.replace(summary.data[0], source="github.com/someone/books"),)
    path.write_text(json.dumps(dataclasses.replace(summary, data=data).to_json()))
    return demo_run


@pytest.fixture
def answer(run, tmp_path):
    """Reads the run's documents with answers."""

    def read(answers, **options):
        path = tmp_path / "answers.yaml"
        path.write_text(answers if isinstance(answers, str) else yaml.safe_dump(answers))
        return read_documents(run, path, **options)

    return read


def entry(documents, key):
    return next(one for _, one in documents.entries if one.field.key == key)


def full_answers(keys):
    """An answer to every field that is asked, none of which contradicts a file."""
    values = {"yes_no": False, "date": datetime.date(2099, 1, 1), "text": "Told.", "categories": None}
    answers = {key: values[field.kind] for key, field in fields_of((*DOCUMENTS, HIGH_RISK)).items() if key in keys}
    answers |= {"data_categories": {"books": "public", "someone/notes": "public"}, "public_data": True}
    return {key: value for key, value in answers.items() if key in keys}


def test_the_empty_file_has_every_open_field_and_answers_nothing(run, answer, tmp_path):
    first = read_documents(run, is_high_risk=True)
    path = tmp_path / "mine.yaml"
    entries = [one for _, one in first.entries]
    count = write_answers(path, entries, first.records, {}, first.documents)
    written = yaml.safe_load(path.read_text())
    is_open = {one.field.key for one in entries if one.status in (Status.OPEN, Status.PART, Status.DEPENDS)}
    assert set(written) == is_open and count == len(is_open) > 60
    assert written["data_categories"] == {"books": None, "someone/notes": None}
    again = answer(path.read_text(), is_high_risk=True)
    assert [one.status for _, one in again.entries] == [one.status for _, one in first.entries]
    with pytest.raises(FileExistsError, match="expected a new file"):
        write_answers(path, entries, first.records, {}, first.documents)


def test_answers_are_merged_marked_and_complete_the_check(run, answer, tmp_path):
    keys = {row["key"] for row in describe_missing(read_documents(run, is_high_risk=True))["missing"]}
    documents = answer(full_answers(keys), is_high_risk=True)
    missing = describe_missing(documents)
    assert missing["complete"] and not missing["contradictions"], missing
    assert entry(documents, "crawler_names").status == Status.NOT_APPLICABLE
    out = tmp_path / "out"
    write_documents(documents, out)
    text = (out / "training_content_summary.md").read_text()
    assert (
        "**Given by the provider:**\nbooks: public; someone/notes: public"
        in (out / "technical_documentation.md").read_text()
    )
    assert "Every required field is filled." in text and "To be filled in by you" not in text.split("Authorized")[0]
    given = json.loads((out / "training_content_summary.json").read_text())["fields"]
    assert {one["key"]: one["answer"] for one in given}["summary_version"] == "Told."


def test_what_was_given_is_kept_in_a_new_file_of_answers(answer, tmp_path):
    documents = answer({"provider_name": "Example Ltd", "code_signatory": "no"})
    path = tmp_path / "second.yaml"
    write_answers(path, [one for _, one in documents.entries], documents.records, documents.answers, DOCUMENTS)
    written = yaml.safe_load(path.read_text())
    assert written["provider_name"] == "Example Ltd" and written["code_signatory"] is False


def test_categories_answer_the_questions_of_the_template(answer):
    documents = answer({"data_categories": {"books": "public", "someone/notes": "licensed"}})
    values = {key: entry(documents, key).answer for key in ("public_data", "licensed_data", "crawled_data")}
    assert values == {"public_data": True, "licensed_data": True, "crawled_data": False}
    assert entry(documents, "licensed_modalities").status == Status.OPEN
    assert entry(documents, "crawler_names").status == Status.NOT_APPLICABLE
    half = answer({"data_categories": {"books": "synthetic"}})
    assert entry(half, "synthetic_data").answer is True and entry(half, "crawled_data").answer is None
    assert entry(half, "data_categories").wants == "the category of someone/notes"
    assert (
        "data_categories says yes"
        in answer({"data_categories": {"books": "user", "someone/notes": "user"}, "user_data": False}).contradictions[
            "user_data"
        ]
    )


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        ({"total_size": "about 7 billion parameters"}, "align/model/model.safetensors says "),
        ({"input_modalities": "text up to 4096 tokens"}, "align/model/config.json: max_position_embeddings says 64"),
        ({"model_authenticity": "SHA-256 " + "0" * 64}, "the hash is another"),
        ({"release_date": datetime.date(1999, 1, 1)}, "align/environment.json: started says"),
        ({"public_data": False}, "pretrain/summary.json: data.0 says books can be looked up"),
        ({"inference_compute": "9e99"}, "align/model/model.safetensors says"),
    ],
)
def test_an_answer_that_contradicts_a_file_is_told_and_shown(answer, tmp_path, answers, said):
    documents = answer(answers)
    (key,) = answers
    assert said in documents.contradictions[key]
    files = write_documents(documents, tmp_path / "out")
    shown = [file for file in files if "ontradiction:" in file.read_text() and file.suffix != ".json"]
    assert shown


def test_answers_that_agree_are_not_told(answer):
    assert not answer(
        {"input_modalities": "text, 64 tokens", "total_size": "small", "public_data": True}
    ).contradictions


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        ("providername: x", "unknown field 'providername', .*did you mean provider_name"),
        ("system_purpose: x", "system_purpose has no effect without --high-risk"),
        ("public_data: maybe", "public_data: got 'maybe', expected yes or no"),
        ("public_data: 1", "public_data: got 1, expected yes or no"),
        ("release_date: soon", "release_date: got 'soon', expected a date"),
        ("release_date: 2026-01-31 10:00:00", "expected a date"),
        ("provider_name: {a: b}", "provider_name: got dict, expected a text"),
        ("provider_name: [[a]]", "provider_name: got list, expected a text"),
        ("data_categories: public", "expected the category of each data set"),
        ("data_categories: {bokks: public}", "got the data set 'bokks', .*did you mean books"),
        ("data_categories: {books: publik}", "got 'publik', expected one of public, .*did you mean public"),
        ("intended_uses: see /home/someone/uses.md", "intended_uses: holds an absolute path"),
        ("provider_contact: token hf_" + "aB3" * 10, "provider_contact: holds something shaped like an access token"),
        ("- a", "holds list, expected answers by field"),
        ("a: [1", "got no YAML"),
        ("3: x", "unknown field 3"),
    ],
)
def test_a_wrong_answer_is_one_line(answer, answers, said):
    with pytest.raises(ValueError, match=said) as error:
        answer(answers)
    assert "\n" not in str(error.value)


def test_bytes_that_are_not_text_are_refused(run, tmp_path):
    (tmp_path / "answers.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="got no YAML"):
        read_documents(run, tmp_path / "answers.yaml")
    with pytest.raises(FileNotFoundError, match="--write-answers makes one"):
        read_documents(run, tmp_path / "nowhere.yaml")
