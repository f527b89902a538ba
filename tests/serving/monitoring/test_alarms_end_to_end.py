"""Real server, Prometheus and Alertmanager: three faults fire and resolve into a webhook, a clean hour fires nothing.

Times are compressed by sixty: an hour of service is a minute here.
"""

import json
import resource
import shutil
import socket
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
from endpoint_server import make_model, make_tokenizer, serving, wait_until

from deepseek_serving.monitoring import request_log
from deepseek_serving.monitoring.alarm_files import write_alarms
from deepseek_serving.monitoring.alarms import AlarmSettings, make_rules
from deepseek_serving.monitoring.drift_job import measure_drift
from deepseek_serving.monitoring.drift_reference import answer_all
from deepseek_serving.monitoring.grafana import make_dashboard
from deepseek_serving.monitoring.memory import read_memory
from deepseek_serving.monitoring.page import make_server
from deepseek_serving.monitoring.request_counts import load_requests
from deepseek_serving.monitoring.watch import Watch
from deepseek_serving.openai_endpoint.engine import Engine, Limits

pytestmark = [
    pytest.mark.serving,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        shutil.which("prometheus") is None or shutil.which("prometheus-alertmanager") is None,
        reason="Prometheus and Alertmanager are not installed; make test-serving brings them",
    ),
]
SCALE = 1 / 60
TEXTS = [f"request number {number} asks about something" for number in range(400)]


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextmanager
def running_program(*words, log):
    with open(log, "w") as file:
        process = subprocess.Popen(words, stdout=file, stderr=file)
        try:
            yield process
        finally:
            process.terminate()
            process.wait(20)


class Traffic:
    """Two clients that ask without a pause; what they ask can be changed."""

    def __init__(self, url):
        self.url, self.texts = url, TEXTS
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(2)]
        self.num_failed = 0

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _ask(self, number):
        while not self._stop.is_set():
            number += 2
            body = {"model": "tiny", "prompt": self.texts[number % len(self.texts)], "max_tokens": 3}
            request = urllib.request.Request(
                f"{self.url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
            )
            try:
                urllib.request.urlopen(request).read()
            except OSError:
                self.num_failed += 1
            self._stop.wait(0.05)


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """The whole chain, with clean traffic and a first drift check."""
    folder = tmp_path_factory.mktemp("chain")
    request_log._MAX_WAIT_S = 0.3  # sixty times as often as half a minute
    model = make_model("ours")
    with Engine(model, Limits(context=256)) as engine:
        tokenizer = make_tokenizer()
        reference = answer_all(engine, [tokenizer(text)["input_ids"] for text in TEXTS], 3)
    reference.save(folder / "reference.npz")
    with ExitStack() as stack:
        server = stack.enter_context(serving(model, requests_folder=folder / "requests"))
        page = make_server(Watch(server.url), 0)
        webhook = f"http://127.0.0.1:{page.server_address[1]}/alerts"
        threading.Thread(target=page.serve_forever, daemon=True).start()
        stack.callback(page.shutdown)
        ports = free_port(), free_port()
        settings = AlarmSettings(
            target=server.url.removeprefix("http://"),
            webhook=webhook,
            time_scale=SCALE,
            alertmanager=f"127.0.0.1:{ports[1]}",
        )
        write_alarms(folder, settings)
        traffic = stack.enter_context(Traffic(server.url))
        chain = Chain(folder, model, server, traffic, f"http://127.0.0.1:{ports[0]}", webhook, settings)
        chain.check_drift()
        options = ("--cluster.listen-address=", f"--storage.path={folder}/alertmanager")
        stack.enter_context(
            running_program(
                "prometheus-alertmanager",
                f"--config.file={folder}/alertmanager.yml",
                f"--web.listen-address=127.0.0.1:{ports[1]}",
                *options,
                log=folder / "alertmanager.log",
            )
        )
        stack.enter_context(
            running_program(
                "prometheus",
                f"--config.file={folder}/prometheus.yml",
                f"--web.listen-address=127.0.0.1:{ports[0]}",
                f"--storage.tsdb.path={folder}/data",
                log=folder / "prometheus.log",
            )
        )
        wait_until(lambda: chain.query("up") and chain.query("up")[0]["value"][1] == "1", 30)
        yield chain


class Chain:
    """What the tests ask."""

    def __init__(self, folder, model, server, traffic, prometheus, webhook, settings):
        self.folder, self.model, self.server, self.traffic = folder, model, server, traffic
        self.prometheus, self.webhook, self.settings = prometheus, webhook, settings

    def query(self, text):
        try:
            address = f"{self.prometheus}/api/v1/query?{urllib.parse.urlencode({'query': text})}"
            return json.load(urllib.request.urlopen(address, timeout=5))["data"]["result"]
        except OSError:
            return []

    def check_drift(self):
        """One check of the requests from now on, when there are sixty."""
        folder, before = self.folder / "requests", time.time()

        def count():
            urllib.request.urlopen(f"{self.server.url}/metrics").read()  # has what was collected counted
            found = load_requests(folder, before, time.time())
            return 0 if found is None else len(found)

        wait_until(lambda: count() >= 60, 60)
        return measure_drift(folder, self.folder / "reference.npz", hours=(time.time() - before) / 3600)

    def told(self, name):
        state = f"{self.webhook.removesuffix('/alerts')}/state"
        rows = json.load(urllib.request.urlopen(state))["alarms"]
        return [row for row in rows if row["name"] == name and row["source"] == "Alertmanager"]

    def fires(self, name, seconds=60):
        wait_until(lambda: any(row["ended"] is None for row in self.told(name)), seconds)

    def resolves(self, name, seconds=60):
        wait_until(lambda: self.told(name) and all(row["ended"] is not None for row in self.told(name)), seconds)


NAMES = [rule["alert"] for group in make_rules(AlarmSettings())["groups"] for rule in group["rules"]]


def test_a_clean_hour_fires_nothing(chain):
    time.sleep(3600 * SCALE)
    assert {name: chain.told(name) for name in NAMES} == {name: [] for name in NAMES}
    assert chain.query("ALERTS") == []
    assert chain.traffic.num_failed == 0
    assert float(chain.query("sum(deepseek_moe_generated_tokens_total)")[0]["value"][1]) > 500


def test_every_panel_of_the_dashboard_has_an_answer(chain):
    dashboard = make_dashboard(chain.settings)
    page = urllib.request.urlopen(f"{chain.server.url}/metrics").read().decode()
    shown = ""
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            if panel["title"] != "Alarms":
                assert chain.query(target["expr"]), (panel["title"], target["expr"])
            shown += target["expr"]
    for name in ("batch_requests", "memory_used_ratio", "drift_kl_nats", "expert_tokens_total", "requests_waiting"):
        assert f"deepseek_moe_{name}" in page and f"deepseek_moe_{name}" in shown
    sdk = pytest.importorskip("grafana_foundation_sdk.models.dashboard", reason="make test-serving brings it")
    read = sdk.Dashboard.from_json(json.loads(Path(chain.folder / "grafana.json").read_text()))
    assert [panel.title for panel in read.panels] == [panel["title"] for panel in dashboard["panels"]]


def test_slow_requests_fire_and_resolve(chain):
    hook = chain.model.register_forward_pre_hook(lambda *_: time.sleep(0.4))
    try:
        chain.fires("SlowRequests")
    finally:
        hook.remove()
    chain.resolves("SlowRequests")


def test_full_memory_fires_and_resolves(chain):
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    machine = next(one for one in read_memory() if one.kind == "machine")
    resource.setrlimit(resource.RLIMIT_DATA, (machine.limit_bytes, hard))
    try:
        used = next(one for one in read_memory() if one.kind == "process").used_bytes
        resource.setrlimit(resource.RLIMIT_DATA, (2 * used, hard))
        filled = bytearray(int(0.86 * used))
        chain.fires("MemoryHigh")
        del filled
        chain.resolves("MemoryHigh")
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def test_other_traffic_fires_drift_and_the_old_resolves_it(chain):
    chain.traffic.texts = ["zzzz " * 8, "qqqq " * 9]
    report = chain.check_drift()
    alarms = [row["distribution"] for row in report["rows"] if row["is_alarm"]]
    assert "tokens" in alarms or "experts" in alarms
    chain.fires("Drift")
    chain.traffic.texts = TEXTS
    time.sleep(1)
    assert not any(row["is_alarm"] for row in chain.check_drift()["rows"])
    chain.resolves("Drift")


def test_a_server_that_ends_is_noticed(chain):
    chain.server.server.should_exit = True
    chain.fires("ServerDown")
