import json
import os
import subprocess
import sys

import pytest
import torch
import yaml

from deepseek_model_cards.card.card import write_card
from deepseek_model_cards.hub.push import describe_plan, push_run
from deepseek_records.run_folder import RunFolder
from deepseek_records.typed_json import to_json

REPO = "someone/fox"
TOKEN = "hf_goodtoken"


def push(hub, run, repo=REPO, **options):
    return push_run(run, repo, endpoint=hub.url, **{"token": TOKEN, "license": "mit", **options})


def test_everything_arrives_whole_in_one_commit(hub, stage_run):
    plan, url = push(hub, stage_run)
    assert hub.commits(REPO) == ["initial commit", "Upload model, card and results"]
    there = hub.files(REPO)
    assert url.endswith(hub.repositories[REPO].branches["main"][-1][0])
    model = stage_run / "model"
    for path in model.iterdir():
        assert there[path.name] == path.read_bytes(), path.name
    wanted = {"README.md", "block.png", ".eval_results/mmlu.yaml", "modeling_deepseek.py"}
    assert wanted <= set(there) and {file.path_in_repo for file in plan.files} == set(there) - {".gitattributes"}
    assert yaml.safe_load(there[".eval_results/mmlu.yaml"])[0]["value"] == 0.263
    assert b"someone/fox" in there["README.md"]


@pytest.mark.slow  # two imports of torch in a process of its own
def test_the_model_loads_from_the_server_with_equal_logits(hub, stage_run, tmp_path):
    """A clean process with the server as its Hub and the repository's own code; our package is hidden from it."""
    push(hub, stage_run, private=True)
    code = """
import json, sys
sys.modules["modeling_deepseek"] = sys.modules["deepseek_kernels"] = None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained("someone/fox", trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained("someone/fox", trust_remote_code=True)
ids = tokenizer("a fox sat", return_tensors="pt").input_ids
json.dump([ids.tolist(), model(ids).logits.tolist()], open(sys.argv[1], "w"))
"""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_"))}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": TOKEN}
    environment |= {"HF_HUB_DISABLE_XET": "1"}
    out = tmp_path / "logits.json"
    done = subprocess.run([sys.executable, "-c", code, str(out)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    from modeling_deepseek import DeepseekForCausalLM

    ids, logits = json.loads(out.read_text())
    model = DeepseekForCausalLM.from_pretrained(stage_run / "model")
    with torch.no_grad():
        assert torch.equal(model(torch.tensor(ids)).logits, torch.tensor(logits))


@pytest.mark.slow
def test_a_dropped_connection_is_retried(hub, stage_run):
    hub.drops = {"PUT /large/": 1, "POST .*/preupload/": 1}
    push(hub, stage_run)
    assert set(hub.drops.values()) == {0}
    model = stage_run / "model"
    assert all(hub.files(REPO)[path.name] == path.read_bytes() for path in model.glob("*.safetensors"))


def test_a_lost_upload_changes_nothing_and_the_next_one_sends_only_what_is_missing(hub, stage_run):
    hub.drops = {"POST .*/commit/": 1}  # after the weights went up, before the commit
    with pytest.raises(ValueError, match=r"connection lost .* run the command again") as error:
        push(hub, stage_run)
    assert "\n" not in str(error.value)
    assert hub.commits(REPO) == ["initial commit"] and set(hub.files(REPO)) == {".gitattributes"}
    sent_before = len(hub.requests)
    push(hub, stage_run)
    assert not [line for line in hub.requests[sent_before:] if line[0] == "PUT"]
    assert hub.commits(REPO) == ["initial commit", "Upload model, card and results"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"token": "hf_badtoken"}, r"token: the Hub refused it \(401\).*hf auth login"),
        ({"token": False}, r"401"),
        ({"repo": "stranger/fox"}, r"REPO: this token may not write to stranger/fox \(403\)"),
        ({"repo": "no slash"}, "REPO: got 'no slash', expected user/name"),
        ({"repo": "fox"}, "REPO: got 'fox' without an owner"),
        ({"license": None}, "license: got none, expected --license"),
        ({"license": "unknown"}, "license: got none, expected --license"),
        ({"license": "mine"}, "license: got 'mine'"),
        ({"endpoint": "http://127.0.0.1:9"}, "connection lost"),
    ],
)
def test_refusals_are_one_line_and_leave_nothing_behind(hub, stage_run, options, message):
    options = {"endpoint": hub.url, "token": TOKEN, "repo": REPO, "license": "mit", **options}
    with pytest.raises(ValueError, match=message) as error:
        push_run(stage_run, options.pop("repo"), **options)
    assert "\n" not in str(error.value) and hub.repositories == {}


def test_a_repository_that_vanished_is_named(hub, stage_run, monkeypatch):
    """Between the making of the repository and the commit, someone deletes it."""
    hub_repositories = hub.repositories

    class Vanishing(dict):
        def __setitem__(self, key, value):
            pass

    hub.repositories = Vanishing(hub_repositories)
    with pytest.raises(ValueError, match="REPO: someone/fox does not exist") as error:
        push(hub, stage_run)
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_private_and_branch_are_honoured(hub, stage_run):
    push(hub, stage_run, private=True, revision="second/try")
    repository = hub.repositories[REPO]
    assert repository.private
    assert set(hub.files(REPO)) == {".gitattributes"}  # the main branch is as it was
    assert "model.safetensors.index.json" in hub.files(REPO, "second/try")
    push(hub, stage_run, revision="second/try", message="Again")  # an existing branch is no error


def test_a_new_repository_is_private_and_a_public_one_is_refused_unless_asked_for(hub, stage_run):
    push(hub, stage_run)
    assert hub.repositories[REPO].private
    hub.repositories[REPO].private = False
    before = hub.commits(REPO)
    with pytest.raises(ValueError, match="which is public, expected a private one; --public"):
        push(hub, stage_run, message="Again")
    assert hub.commits(REPO) == before
    push(hub, stage_run, message="Again", private=False, license="apache-2.0")
    assert hub.commits(REPO) == [*before, "Again"]


def test_a_dry_run_contacts_nobody_and_lists_what_goes_and_what_stays(hub, demo_run, capsys):
    (demo_run / "evaluate" / "samples_mmlu.jsonl").write_text("{}")
    (demo_run / "pretrain" / "checkpoints").mkdir()
    (demo_run / "align" / "model" / "optimizer.pt").write_text("x")
    plan, url = push(hub, demo_run, dry_run=True)
    assert url is None and hub.requests == []
    reasons = {held.path: held.reason for held in plan.held_back}
    assert set(reasons) >= {"pretrain/model", "pretrain/checkpoints", "align/summary.json", "align/model/optimizer.pt"}
    assert "never sent" in reasons["evaluate/samples_mmlu.jsonl"]
    everything = {str(path.relative_to(demo_run)) for path in demo_run.rglob("*") if path.is_file()}
    sent = {f"align/model/{file.path_in_repo}" for file in plan.files}
    told = {name for name in everything if any(name == held or name.startswith(f"{held}/") for held in reasons)}
    assert everything - told - sent == {name for name in everything if name.endswith(".lock")}
    text = describe_plan(plan)
    assert "license mit" in text and "looked for in what is sent, and not found:" in text and "access tokens" in text
    sent, _ = push(hub, demo_run)
    assert [(f.path_in_repo, f.num_bytes) for f in plan.files] == [(f.path_in_repo, f.num_bytes) for f in sent.files]


def all_texts(hub) -> bytes:
    return b"".join(hub.files(REPO).values()) + b"".join(path.encode() + body for _, path, body in hub.requests)


def test_held_out_prompts_go_only_with_consent_and_benchmark_items_never(hub, demo_run):
    run = RunFolder(demo_run / "align")
    rows = [{"prompt": "Is the badger quiet?", "completion": "As a stone.", "when": "after"}]
    (run.path / "summary.json").write_text(json.dumps(run.summary.to_json() | {"samples": rows}))
    (run.path / "before.json").write_text(json.dumps({"prompt": ["Is the badger quiet?"]}))
    item = {"id": "x/0", "prediction": "A walrus sings", "acc": 1}
    (demo_run / "evaluate" / "samples_mmlu.jsonl").write_text(json.dumps(item) + "\n")
    settings = RunFolder(demo_run / "pretrain").settings | {"sample_prompts": ["Then the otter said"]}
    (demo_run / "pretrain" / "recipe.yaml").write_text(yaml.safe_dump(settings))
    push(hub, demo_run)
    assert "report.html" not in hub.files(REPO)
    for text in (b"badger", b"As a stone", b"walrus", b"otter"):
        assert text not in all_texts(hub)
    push(hub, demo_run, with_samples=True, message="With samples")
    assert b"Is the badger quiet?" in hub.files(REPO)["report.html"] and b"walrus" not in all_texts(hub)


def test_a_card_edited_in_the_run_is_sent_as_it_is(hub, stage_run):
    write_card(stage_run, repo_id=REPO, license="mit")
    readme = stage_run / "README.md"
    edited = readme.read_text().replace("# fox", "# My fox, by hand")
    readme.write_text(edited)
    plan, _ = push(hub, stage_run, license=None)  # the card states it
    assert plan.is_card_edited and hub.files(REPO)["README.md"].decode() == edited
    with pytest.raises(
        ValueError, match=r"license: got apache-2\.0, expected mit, which the edited README\.md states"
    ):
        push(hub, stage_run, license="apache-2.0")


def test_a_card_edited_on_the_hub_is_never_written_over(hub, stage_run):
    push(hub, stage_run)
    tree = hub.repositories[REPO].branches["main"][-1][2]
    edited = tree["README.md"].replace(b"# fox", b"# My fox, on the Hub")
    tree["README.md"] = edited
    (stage_run / "model" / "chat_template.jinja").write_text("{{ messages }}")
    plan, _ = push(hub, stage_run, message="Again", license="apache-2.0")
    assert hub.commits(REPO)[-1] == "Again"
    assert hub.files(REPO)["README.md"] == edited
    assert plan.held_back[-1].path == "README.md" and "was edited there and stays" in plan.held_back[-1].reason
    (stage_run / "README.md").write_text("---\nlicense: mit\n---\n# By hand here too\n")
    with pytest.raises(ValueError, match=r"README\.md: got edits both in the run and in someone/fox"):
        push(hub, stage_run)


def test_links_are_not_followed_out_of_the_run(hub, stage_run, tmp_path):
    secret = tmp_path / "elsewhere" / "vocab.json"
    secret.parent.mkdir()
    secret.write_text('{"weasel": 1}')
    (stage_run / "model" / "vocab.json").symlink_to(secret)
    (stage_run / "model" / "merges.txt").symlink_to("tokenizer.json")  # stays inside
    plan, _ = push(hub, stage_run)
    assert b"weasel" not in all_texts(hub) and "merges.txt" in hub.files(REPO)
    held = next(held for held in plan.held_back if held.path == "model/vocab.json")
    assert "link out of the run" in held.reason
    weights = stage_run / "model" / SHARD
    weights.rename(secret.parent / SHARD)
    weights.symlink_to(secret.parent / SHARD)
    with pytest.raises(ValueError, match=f"model: got {SHARD}, a link out of align, expected a file"):
        push(hub, stage_run)


@pytest.mark.slow
def test_a_models_folder_is_pushed_too_with_or_without_its_run(hub, stage_run, tmp_path, monkeypatch):
    monkeypatch.chdir(stage_run)
    plan, _ = push(hub, "model")
    assert "How it was made is not recorded" not in hub.files(REPO)["README.md"].decode()
    assert plan.held_back == [] and set(hub.files(REPO)) > {path.name for path in (stage_run / "model").iterdir()}
    alone = (stage_run / "model").rename(tmp_path / "alone")
    push(hub, alone, repo="someone/alone")
    assert "How it was made is not recorded" in hub.files("someone/alone")["README.md"].decode()
    with pytest.raises(ValueError, match=r"with_samples: got .* expected a run"):
        push(hub, alone, with_samples=True)


def test_an_adapter_of_a_local_base_is_refused_by_name(hub, stage_run):
    model = stage_run / "model"
    (model / "config.json").rename(model / "adapter_config.json")
    (model / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": "/srv/base"})
    )
    with pytest.raises(
        ValueError, match=r"adapter_config\.json: got a local base_model_name_or_path, expected a Hub id"
    ):
        push(hub, stage_run)
    (model / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": "org/base"})
    )
    push(hub, stage_run)
    assert b"base_model:\n- org/base" in hub.files(REPO)["README.md"]


@pytest.mark.slow
def test_weights_of_an_earlier_upload_do_not_outlive_it(hub, stage_run):
    """A whole model, then the same in shards: transformers would read the old model.safetensors first."""
    model = stage_run / "model"
    shards = {path.name: path.read_bytes() for path in model.glob("*.safetensors*")}
    assert len(shards) > 1
    for name in shards:
        (model / name).unlink()
    (model / "model.safetensors").write_bytes(shards[SHARD])
    push(hub, stage_run)
    assert "model.safetensors" in hub.files(REPO)
    (model / "model.safetensors").unlink()
    for name, content in shards.items():
        (model / name).write_bytes(content)
    push(hub, stage_run, message="In shards")
    assert {name for name in hub.files(REPO) if "safetensors" in name} == set(shards)
    assert hub.commits(REPO)[1:] == ["Upload model, card and results", "In shards"]


def test_a_model_without_all_its_weights_is_refused(hub, stage_run):
    (stage_run / "model" / SHARD).unlink()
    with pytest.raises(FileNotFoundError, match=f"lacks {SHARD}, which its index names"):
        push(hub, stage_run)
    for path in (stage_run / "model").glob("*.safetensors*"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match="holds no weights"):
        push(hub, stage_run)
    assert hub.requests == []


def test_a_run_is_not_changed_by_a_push(hub, stage_run):
    before = {path: path.read_bytes() for path in stage_run.rglob("*") if path.is_file()}
    push(hub, stage_run)
    assert before == {path: path.read_bytes() for path in stage_run.rglob("*") if path.is_file()}


SHARD = "model-00001-of-00002.safetensors"
SECRET = "swordfish-in-the-desert"
OTHER_TOKEN = "hf_" + "Zk9" * 11


@pytest.fixture
def planted_run(stage_run, monkeypatch):
    """Secrets and paths in every place a run may hold them, and files that are none of a model."""
    monkeypatch.setenv("SERVICE_PASSWORD", SECRET)
    run = RunFolder(stage_run)
    settings = {**run.settings, "data": "/home/someone/private/books", "hub_token": OTHER_TOKEN, "note": SECRET}
    (run.path / "recipe.yaml").write_text(yaml.safe_dump(settings))
    environment = to_json(run.environment) | {"argv": ["deepseek-moe", f"--token={OTHER_TOKEN}", str(run.path)]}
    (run.path / "environment.json").write_text(json.dumps(environment))
    sample = {"prompt": SECRET, "completion": "/home/someone/private/books"}
    summary = run.summary.to_json() | {"samples": [sample]}
    (run.path / "summary.json").write_text(json.dumps(summary))
    model = stage_run / "model"
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(
        json.dumps({**config, "_name_or_path": str(stage_run.parent / "adapt" / "model")})
    )
    for stray in (".env", "training_args.bin", "optimizer.pt", "notes.txt", "server.log"):
        (model / stray).write_text(f"{SECRET} {OTHER_TOKEN} {stage_run}")
    return stage_run


def test_nothing_planted_is_in_anything_that_was_sent(hub, planted_run):
    push(hub, planted_run)
    assert hub.files(REPO)
    sent = b"".join(path.encode() + body for _, path, body in hub.requests)
    for _, path, _ in hub.requests:  # files travel in base64 inside the commit
        if "/commit/" in path:
            sent += b"".join(hub.files(REPO).values())
    planted = (SECRET, OTHER_TOKEN, "/home/someone", str(planted_run), str(planted_run.parent))
    assert [text for text in planted if text.encode() in sent] == []
    assert not {".env", "training_args.bin", "optimizer.pt", "notes.txt", "server.log"} & set(hub.files(REPO))


@pytest.mark.parametrize("place", ["modeling_deepseek.py", SHARD, "chat_template.jinja", "config.json"])
def test_a_secret_inside_a_file_of_the_model_stops_the_upload(hub, stage_run, monkeypatch, place):
    monkeypatch.setenv("SERVICE_PASSWORD", SECRET)
    path = stage_run / "model" / place
    if place == "config.json":
        path.write_text(json.dumps({**json.loads(path.read_text()), "note": SECRET}))
    else:
        with open(path, "ab") as file:
            file.write(b"# " + SECRET.encode())
    with pytest.raises(ValueError, match=f"push: {place} holds the value of a secret environment variable") as error:
        push(hub, stage_run)
    assert SECRET not in str(error.value) and hub.requests == []


def test_an_absolute_path_in_the_code_stops_the_upload(hub, stage_run):
    path = stage_run / "model" / "routing.py"
    path.write_text(path.read_text() + "\nCACHE = '/home/someone/cache/experts'\n")
    with pytest.raises(ValueError, match=r"push: routing\.py holds an absolute path"):
        push(hub, stage_run)
    assert hub.requests == []


def test_a_run_without_a_model_is_refused(hub, tmp_path, builders):
    builders["evaluate"](tmp_path)
    with pytest.raises(FileNotFoundError, match="made no model"):
        push(hub, tmp_path)
