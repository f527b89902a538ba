"""The page of a real server: its figures, its alarms, those that Alertmanager posts, and how a browser draws it."""

import json
import shutil
import subprocess
import threading
import urllib.error
import urllib.request
from contextlib import contextmanager
from importlib import resources

import pytest

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
from endpoint_server import make_model, serving, wait_until

from deepseek_cli.main import main
from deepseek_serving.monitoring.alarm_history import AlarmHistory
from deepseek_serving.monitoring.alarms import AlarmSettings
from deepseek_serving.monitoring.evaluations import add_evaluation, compare
from deepseek_serving.monitoring.page import make_server
from deepseek_serving.monitoring.watch import Watch, parse, quantile

POST = {
    "alerts": [
        {
            "status": "firing",
            "labels": {"alertname": "MemoryHigh", "kind": "machine", "job": "deepseek-moe"},
            "annotations": {"summary": "93% of the memory is used"},
            "startsAt": "2026-11-26T10:00:00Z",
            "endsAt": "0001-01-01T00:00:00Z",
        }
    ]
}


@contextmanager
def shown(watch):
    """The page's address, and the watch at work."""
    page, stop = make_server(watch, 0), threading.Event()
    threads = [threading.Thread(target=page.serve_forever), threading.Thread(target=watch.run, args=(stop,))]
    for thread in threads:
        thread.start()
    try:
        yield f"http://127.0.0.1:{page.server_address[1]}"
    finally:
        stop.set()
        page.shutdown()
        page.server_close()
        for thread in threads:
            thread.join()


def post(url, body):
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    return urllib.request.urlopen(request).read()


def ask(running, number):
    for _ in range(number):
        post(f"{running.url}/v1/completions", {"model": "tiny", "prompt": "abc def", "max_tokens": 5})


def get_state(url):
    return json.load(urllib.request.urlopen(f"{url}/state"))


def test_the_page_shows_the_servers_figures_and_alarms(tmp_path, capsys):
    add_evaluation(tmp_path, 0.0, "humaneval", {"a": 1.0, "b": 0.0})
    with serving(make_model("ours"), requests_folder=tmp_path) as running:
        # Everything counts as slow: the alarm fires as soon as there are enough answers.
        watch = Watch(running.url, 0.05, AlarmSettings(latency_s=0.01), tmp_path)
        watch.look()
        with shown(watch) as url:
            ask(running, 25)
            wait_until(lambda: get_state(url)["series"][-1]["num_answers"] >= 20)
            state = get_state(url)
            assert state["model"] == "tiny" and state["series"][-1]["tokens_per_s"] > 0
            assert [layer["name"] for layer in state["layers"]] == ["model.layers.1.mlp", "model.layers.2.mlp"]
            assert sum(state["layers"][0]["now"]) == pytest.approx(1)
            assert state["evaluations"][0]["score"] == 0.5
            wait_until(lambda: any(row["name"] == "SlowRequests" for row in get_state(url)["alarms"]))
            assert post(f"{url}/alerts", POST) == b"1 alarms noted"
            told = {row["name"]: row for row in get_state(url)["alarms"]}
            assert told["MemoryHigh"]["source"] == "Alertmanager" and told["MemoryHigh"]["ended"] is None
            with pytest.raises(urllib.error.HTTPError) as refused:
                post(f"{url}/alerts", {"alerts": [1]})
            assert refused.value.code == 400
            assert main(["monitor", running.url, "--latency", "0.01"]) == 0
            assert "tiny: 0 in the batch" in capsys.readouterr().out
        port = url.rpartition(":")[2]
        with make_server(watch, int(port)), pytest.raises(ValueError, match="--port"):
            make_server(watch, int(port))
    watch.look()
    assert watch.state()["failed"] and watch.alarms.rows()[0]["name"] == "ServerDown"
    assert main(["monitor", running.url]) == 1


def test_alarms_are_kept_for_the_next_page(tmp_path):
    history = AlarmHistory(tmp_path / "alarms.jsonl")
    history.receive(POST)
    ended = {**POST["alerts"][0], "status": "resolved", "endsAt": "2026-11-26T10:07:00Z"}
    history.receive({"alerts": [ended]})
    history.receive({"alerts": [ended]})  # Alertmanager repeats itself
    history.tell("Drift", "tokens", True, "far", 5.0)
    rows = AlarmHistory(tmp_path / "alarms.jsonl").rows()
    assert [(row["name"], row["ended"] is None) for row in rows] == [("MemoryHigh", False), ("Drift", True)]
    assert rows[0]["ended"] - rows[0]["started"] == 7 * 60


def test_quantiles_and_paired_falls():
    before = parse('a_bucket{le="1.0"} 5\na_bucket{le="2.0"} 5\na_bucket{le="+Inf"} 5\n')
    now = parse('a_bucket{le="1.0"} 15\na_bucket{le="2.0"} 25\na_bucket{le="+Inf"} 25\n')
    assert quantile(now, before, "a", 0.5) == 1.0 and quantile(now, before, "a", 0.75) == 1.5
    assert quantile(before, before, "a", 0.5) is None
    items = [str(number) for number in range(20)]
    fell, p = compare(dict.fromkeys(items, 1.0), {item: float(int(item) > 6) for item in items})
    assert fell and p == pytest.approx(2**-7)
    fell, p = compare(dict.fromkeys(items, 1.0), {item: float(int(item) > 5) for item in items})
    assert not fell and p == pytest.approx(2**-6)


def test_the_page_asks_nothing_of_others():
    html = resources.files("deepseek_serving.monitoring").joinpath("templates/page.html").read_text()
    assert "http:" not in html and "https:" not in html and "//cdn" not in html


@pytest.mark.serving
@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed; make test-serving brings it")
def test_a_browser_draws_it_at_three_widths(tmp_path):
    import matplotlib.image
    import numpy as np

    def open_page(url, width, *options):
        words = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-background-networking"]
        words += ["--no-first-run", "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1"]
        words += [f"--user-data-dir={tmp_path}/profile", "--virtual-time-budget=3000", f"--window-size={width},1400"]
        return subprocess.run(["chromium", *words, *options, url], capture_output=True, text=True, timeout=120).stdout

    with serving(make_model("ours")) as running, shown(Watch(running.url, 0.5)) as url:
        ask(running, 10)
        wait_until(lambda: get_state(url)["layers"])
        for width in (420, 820, 1280):
            picture = tmp_path / f"{width}.png"
            open_page(url, width, f"--screenshot={picture}")
            pixels = matplotlib.image.imread(picture)
            assert pixels.shape[1] == width
            assert len(np.unique((pixels[..., :3] * 15).astype(int).reshape(-1, 3), axis=0)) > 20
        page = open_page(url, 1280, "--dump-dom")
    for text in ("all is well", "layer 1", "None fired", "experts per token", "<path"):
        assert text in page
