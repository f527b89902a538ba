"""The generated alarms: Prometheus' own tools accept and test them, and notice a wrong rule."""

import shutil

import pytest
import yaml

from deepseek_cli.main import main
from deepseek_serving.monitoring.alarm_files import check_with_promtool, write_alarms
from deepseek_serving.monitoring.alarms import AlarmSettings

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None or shutil.which("amtool") is None,
    reason="promtool and amtool are not installed; make test-serving brings them",
)


@pytest.mark.serving  # nine runs of promtool
@needs_promtool
def test_promtool_accepts_the_files_and_notices_a_wrong_rule(tmp_path, capsys):
    assert main(["monitor", "rules", str(tmp_path), "--check"]) == 0
    assert capsys.readouterr().out.count("passed") == 3
    rules = yaml.safe_load((tmp_path / "alerts.yml").read_text())
    for group in rules["groups"]:
        for rule in group["rules"]:
            broken = rule["expr"].replace(">", "<").replace("== 0", "!= 0")
            changed = (tmp_path / "alerts.yml").read_text().replace(rule["expr"], broken)
            other = tmp_path / rule["alert"]
            shutil.copytree(tmp_path, other, ignore=shutil.ignore_patterns("[A-Z]*"))
            (other / "alerts.yml").write_text(changed)
            with pytest.raises(ValueError, match="promtool test rules"):
                check_with_promtool(other)


def test_thresholds_reach_the_rules_and_wrong_ones_are_refused(tmp_path):
    write_alarms(tmp_path, AlarmSettings(latency_s=1, memory_ratio=0.8, drift_nats=0.3, api_key_file="key.txt"))
    rules = (tmp_path / "alerts.yml").read_text()
    assert 'le="1.0"' in rules and "> 0.8" in rules and "> 0.3" in rules
    scrape = yaml.safe_load((tmp_path / "prometheus.yml").read_text())["scrape_configs"][0]
    assert scrape["authorization"]["credentials_file"].endswith("/key.txt")
    for wrong, named in (
        ({"latency_s": 0.3}, "boundaries"),
        ({"memory_ratio": 1.5}, "share"),
        ({"drift_nats": 0}, "nats"),
    ):
        with pytest.raises(ValueError, match=named):
            AlarmSettings(**wrong)


def test_the_latency_boundaries_are_the_servers():
    pytest.importorskip("prometheus_client", reason="the extra `serve` is not installed")
    from deepseek_serving.monitoring.alarms import BOUNDARIES
    from deepseek_serving.openai_endpoint import metrics

    assert metrics._SECONDS == BOUNDARIES


def test_without_promtool_the_check_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["monitor", "rules", str(tmp_path / "out"), "--check"]) == 2
    assert capsys.readouterr().err == (
        "deepseek-moe monitor rules: error: --check: promtool is not there; on Debian, apt-get install prometheus "
        "brings it; the files are written\n"
    )
    assert (tmp_path / "out/alerts.yml").exists()
