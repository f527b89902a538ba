"""Writes the alarms' files, and has Prometheus' and Alertmanager's own tools check them."""

import json
import shutil
import subprocess
from pathlib import Path

import yaml

from deepseek_serving.monitoring.alarm_tests import make_rule_tests
from deepseek_serving.monitoring.alarms import AlarmSettings, make_alertmanager, make_prometheus, make_rules
from deepseek_serving.monitoring.grafana import make_dashboard


def write_alarms(folder: Path, settings: AlarmSettings) -> list[Path]:
    """Write all files, and return their paths.

    Args:
        folder: Is made if need be.
        settings: What they say.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = {
        "prometheus.yml": make_prometheus(settings),
        "alerts.yml": make_rules(settings),
        "alertmanager.yml": make_alertmanager(settings),
        "alerts_test.yml": make_rule_tests(settings),
    }
    for name, content in files.items():
        text = yaml.safe_dump(content, sort_keys=False, width=1000, allow_unicode=True)
        (folder / name).write_text(text, encoding="utf-8")
    dashboard = folder / "grafana.json"
    dashboard.write_text(json.dumps(make_dashboard(settings), indent=1) + "\n", encoding="utf-8")
    return [*(folder / name for name in files), dashboard]


def check_with_promtool(folder: Path) -> list[str]:
    """Have Prometheus' and Alertmanager's own tools check the files, and return what each said last.

    Args:
        folder: From `write_alarms`.

    Raises:
        FileNotFoundError: The tools are not installed.
        ValueError: They refuse a file.
    """
    commands = (
        ("promtool", "check", "config", "prometheus.yml"),
        ("promtool", "test", "rules", "alerts_test.yml"),
        ("amtool", "check-config", "alertmanager.yml"),
    )
    for tool, package in (("promtool", "prometheus"), ("amtool", "prometheus-alertmanager")):
        if shutil.which(tool) is None:
            raise FileNotFoundError(
                f"--check: {tool} is not there; on Debian, apt-get install {package} brings it; the files are written"
            )
    said = []
    for command in commands:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"{' '.join(command)}: {' '.join((done.stdout + done.stderr).split())[:1500]}")
        said.append(f"{' '.join(command)}: passed")
    return said
