from pathlib import Path

import pytest

from deepseek_records.leaks import find_leaks, scrub, secret_values


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
