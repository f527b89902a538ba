import importlib.util
from pathlib import Path

import pytest

from deepseek_records import leaks
from deepseek_records.leaks import find_leaks, inspect_files, scrub, secret_values
from deepseek_records.secret_shapes import library_patterns, person_pattern

_SPEC = importlib.util.spec_from_file_location("leak_cases", Path(__file__).with_name("leak_cases.py"))
cases = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(cases)


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("/home/me/data/books.txt", "books.txt"),
        ("deepseek-moe adapt --data=/srv/corpora/x.jsonl --seed 3", "deepseek-moe adapt --data=x.jsonl --seed 3"),
        ("C:\\Users\\me\\books.txt", "books.txt"),
        ("~/models/base", "base"),
        ("see '/var/lib/x/' there", "see 'x' there"),
        # What must stay: URLs, repository ids, relative paths, fractions, alternatives, markup, dates.
        ("https://huggingface.co/datasets/cais/mmlu", "https://huggingface.co/datasets/cais/mmlu"),
        ("runs/demo/pretrain and cais/mmlu", "runs/demo/pretrain and cais/mmlu"),
        ("./data/x.txt ../data/x.txt", "./data/x.txt ../data/x.txt"),
        ("1/2, and/or/not, 2026/11/23", "1/2, and/or/not, 2026/11/23"),
        ("<b>bold</b></p>", "<b>bold</b></p>"),
    ],
)
def test_paths_lose_their_folders_and_nothing_else_changes(text, clean):
    assert scrub(text) == clean


@pytest.mark.parametrize(
    "token",
    [
        "hf_" + "aB3" * 10,
        "ghp_" + "x" * 36,
        "sk-" + "y1" * 20,
        "AKIA" + "ABCDEFGH12345678",
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.abcdefghijkl",
    ],
)
def test_tokens_are_removed_and_found(token):
    assert token not in scrub({"note": [f"use {token}."]})["note"][0]
    assert find_leaks(f"use {token}.".encode(), is_text=True)


def test_values_of_secret_variables_are_found_in_weights_too(monkeypatch):
    monkeypatch.setenv("MY_SERVICE_PASSWORD", "correct horse battery")
    monkeypatch.setenv("EDITOR_NAME", "not a secret at all")
    monkeypatch.setenv("SHORT_TOKEN", "1234567")  # too short: would be found by chance
    assert "correct horse battery" in secret_values()
    assert "not a secret at all" not in secret_values() and "1234567" not in secret_values()
    found = find_leaks(b"\x00\x01correct horse battery\xff", is_text=False)
    assert found == ["the value of a secret environment variable"]
    assert scrub("it is correct horse battery.") == "it is [removed]."


def test_the_runs_own_folders_are_found_in_any_file():
    assert find_leaks(b"\x00/data/project-x/run\x00", is_text=False, folders=[Path("/data/project-x")])
    assert not find_leaks(b"\x00/data/project-y/run\x00", is_text=False, folders=[Path("/data/project-x")])
    assert find_leaks(b"x/data/project-x", is_text=False, folders=[Path("/data/project-x")])


def test_a_short_home_is_found_only_as_a_whole():
    for content in (b"file:///root/books.txt", b"\x00/root\x00", b"cache=/root/x"):
        assert find_leaks(content, is_text=False, folders=[Path("/root")]), content
    for content in (b"https://huggingface.co/rootcause/my-moe", b"https://host/root/x", b"a /rooted tree"):
        assert not find_leaks(content, is_text=False, folders=[Path("/root")]), content


def test_a_tokenizers_name_is_no_secret(monkeypatch):
    monkeypatch.setenv("TOKENIZER_NAME", "deepseek-moe")
    monkeypatch.setenv("GITHUBTOKEN", "swordfish-one")
    monkeypatch.setenv("PGPASSWORD", "swordfish-two")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "swordfish-three")
    assert scrub("load with deepseek-moe generate") == "load with deepseek-moe generate"
    assert {"swordfish-one", "swordfish-two", "swordfish-three"} <= set(secret_values())


def test_settings_named_like_secrets_lose_their_values_but_counts_stay():
    settings = {"hub_token": "abc", "api_key": "def", "max_new_tokens": 96, "pad_token": "<pad>", "token": None}
    clean = scrub(settings)
    assert clean["hub_token"] == clean["api_key"] == "[removed]"
    assert clean["max_new_tokens"] == 96 and clean["token"] is None


def test_find_leaks_says_nothing_about_clean_text():
    assert find_leaks(b"A card that links https://huggingface.co/docs/hub/model-cards.", is_text=True) == []


def test_findings_never_quote_the_secret(monkeypatch):
    monkeypatch.setenv("DEPLOY_SECRET", "open sesame 42")
    assert "sesame" not in " ".join(find_leaks(b"open sesame 42", is_text=True))


@pytest.mark.parametrize("kind", cases.TOKENS)
def test_every_kind_of_token_is_removed_and_found_anywhere(kind):
    token = cases.TOKENS[kind]
    assert token not in scrub(f"use {token}.")
    for is_text in (True, False):
        assert find_leaks(f"\0use {token}.".encode(), is_text=is_text)


@pytest.mark.parametrize("text", cases.NAMED)
def test_secrets_named_by_what_stands_around_them_are_removed_and_found(text):
    assert cases.NAMED[text] not in scrub(text)
    assert find_leaks(text.encode(), is_text=True)


@pytest.mark.parametrize("text", cases.PATHS)
def test_every_kind_of_path_keeps_its_last_part(text):
    assert scrub(text) == cases.PATHS[text]
    assert find_leaks(text.encode(), is_text=True)


@pytest.mark.parametrize("text", cases.CLEAN)
def test_what_only_looks_alike_is_left_alone(text):
    assert scrub(text) == text
    assert not find_leaks(text.encode(), is_text=True)


@pytest.mark.parametrize(
    ("name", "value", "secret"),
    [
        ("STRIPE_KEY", "swordfish-1", "swordfish-1"),
        ("DB_PASS", "swordfish-2", "swordfish-2"),
        ("MYSQL_PASSWORD_FILE", "swordfish-3", "swordfish-3"),
        ("GITLAB_PAT", "swordfish-4", "swordfish-4"),
        ("DATABASE_URL", "postgres://me:swordfish-5@host/db", "swordfish-5"),
        ("CACHE_LOCATION", "redis://:swordfish-6@host:1", "swordfish-6"),
        ("AZURE_CONNECTION_STRING", "Host=x;Password=swordfish-7", "Host=x;Password=swordfish-7"),
        ("SENTRY_DSN", "https://swordfish@host/8", "https://swordfish@host/8"),
        ("DB_PWD", "swordfish-9", "swordfish-9"),
    ],
)
def test_variables_are_secret_by_their_meaning(name, value, secret):
    assert secret in secret_values({name: value})


@pytest.mark.parametrize(
    "name", ["PWD", "OLDPWD", "TOKENIZER_NAME", "MONKEY", "KEYBOARD", "COMPASS", "PATH", "PATTERN"]
)
def test_variables_of_other_meaning_are_not(name):
    assert not secret_values({name: "just-some-value"})


def test_a_persons_name_in_a_path_is_removed_and_found(monkeypatch):
    monkeypatch.setattr(leaks.Path, "home", lambda: Path("/home/ada.lovelace"))
    assert scrub("runs/ada.lovelace/x.txt") == "x.txt" and scrub("scratch/ada.lovelace") == "ada.lovelace"
    assert find_leaks(b"../runs/ada.lovelace/x", is_text=True) == ["a person's name in a path"]
    assert not find_leaks(b"by ada.lovelace, 1843", is_text=True)
    assert person_pattern("root") is None


def test_files_are_inspected_by_kind_and_links_stay_inside(tmp_path, monkeypatch):
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    run.mkdir(), elsewhere.mkdir()
    (elsewhere / "secrets.json").write_text("{}")
    (run / "config.json").symlink_to(elsewhere / "secrets.json")
    (run / "inner.json").symlink_to(run / "vocab.json")
    (run / "vocab.json").write_text('{"/usr/bin/x": 1, "' + cases.TOKENS["hub"] + '": 2}')
    (run / "tokenizer.json").write_text('{"/usr/bin/x": 1, "C:\\\\Users": 2}')
    (run / "README.md").write_text("clean")
    report = inspect_files({path.name: path for path in sorted(run.iterdir())}, folders=[run])
    assert report.found == {
        "config.json": ["a link out of its folder"],
        "inner.json": ["something shaped like an access token", "an absolute path (/usr/bin/x)"],
        "vocab.json": ["something shaped like an access token"],
    }
    assert report.num_files == 5
    assert "Stripe" in str(report) and "links that leave their folder" in str(report)
    assert cases.TOKENS["hub"] not in str(report)


def test_of_weights_the_head_is_searched_too():
    head = ('{"__metadata__":{"note":"' + cases.TOKENS["gitlab"] + '"}}').encode()
    content = len(head).to_bytes(8, "little") + head + bytes(100)
    assert find_leaks(content, is_text=False) == ["something shaped like an access token"]


def test_the_librarys_detectors_take_part():
    assert {"Twilio", "Square", "Telegram"} <= set(library_patterns())
    found = find_leaks(b"id " + b"sq0csp-" + b"aB3xY9kLm0pQrStUvWxYz1aB3xY9kLm0pQrStUvWxYz", is_text=True)
    assert found == ["something shaped like a secret of Square"]


def test_pages_and_embedded_texts_raise_no_alarm():
    root = Path(__file__).resolve().parents[2]
    for path in (root / "README.md", *sorted((root / "training/recipes").glob("*.yaml"))):
        assert not find_leaks(path.read_bytes(), is_text=True), path
