"""`deepseek-moe monitor` on a real server's requests: a reference beside the checkpoint, a check, what is refused."""

import pytest

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
import json
import urllib.request

from endpoint_server import make_model, make_tokenizer, serving

from deepseek_cli.main import main


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("monitor") / "model"
    make_model("ours").save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


def post(url, **fields):
    body = {"model": "tiny", "max_tokens": 4, "temperature": 1} | fields
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


def test_what_a_server_kept_is_compared_with_the_reference(checkpoint, tmp_path, capsys):
    texts = tmp_path / "texts.txt"
    texts.write_text("\n\n".join(f"text number {number} about nothing" for number in range(60)))
    words = ["monitor", "reference", str(checkpoint), "--data", str(texts), "--max-tokens", "4"]
    assert main(words) == 2
    assert "--at-least" in capsys.readouterr().err
    rows = [json.dumps({"text": f"text number {number} about nothing"}) for number in range(60)]
    texts = tmp_path / "texts.jsonl"
    texts.write_text("\n".join(rows))
    words[4] = str(texts)
    assert main([*words, "--at-least", "60"]) == 0
    assert (checkpoint / "drift_reference.npz").exists()
    capsys.readouterr()
    folder = tmp_path / "requests"
    with serving(make_model("ours"), requests_folder=folder) as running:
        for number in range(24):
            post(running.url, prompt=f"text number {number} about nothing")
        assert post(running.url, prompt="text", max_tokens=30, stop="a")["choices"][0]["text"] is not None
    assert sum(1 for _ in folder.glob("requests-*.npz")) >= 1
    assert b"nothing" not in b"".join(path.read_bytes() for path in folder.iterdir())
    assert main(["monitor", "drift", str(folder), "--model", str(checkpoint)]) in (0, 3)
    said = capsys.readouterr().out
    assert said.startswith("25 requests in 24 hours, 25 of them compared") and "experts model.layers.1.mlp" in said
    with serving(make_model("ours"), requests_folder=folder) as running:
        page = urllib.request.urlopen(f"{running.url}/metrics").read().decode()
    assert 'deepseek_moe_drift_p_value{distribution="experts",layer="model.layers.1.mlp"}' in page
    assert main(["monitor", "drift", str(folder), "--model", str(checkpoint), "--hours", "0"]) == 2
    assert main(["monitor", "drift", str(tmp_path / "none"), "--model", str(checkpoint)]) == 2
    assert "--requests" in capsys.readouterr().err
