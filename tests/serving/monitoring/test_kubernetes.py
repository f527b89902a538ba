"""The manifests: schemas of Kubernetes and of the Prometheus operator accept them, and promtool the rules."""

import json
import shutil
import subprocess
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from deepseek_cli.main import main
from deepseek_serving.monitoring.alarms import AlarmSettings
from deepseek_serving.monitoring.kubernetes import ENGINES, ManifestSettings, make_manifests

# From the operator's API reference, monitoring.coreos.com/v1: its schemas let unknown fields pass.
RULE_FIELDS = {"alert", "expr", "for", "labels", "annotations"}
ENDPOINT_FIELDS = {"port", "path", "interval", "authorization"}


def settings(engine, **changes):
    values = {"name": "moe", "image": "registry.example/moe:1", "claim": "models", "model": "demo"} | changes
    return ManifestSettings(engine, **values)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("gpus", [0, 2])
def test_schemas_accept_them(engine, gpus):
    deployment, service, monitor, rule = make_manifests(settings(engine, gpus=gpus), AlarmSettings())
    for one in (deployment, service):
        kubernetes_validate.validate(one, "1.30", strict=True)
    broken = {**deployment, "spec": {**deployment["spec"], "replicas": "two"}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, "1.30", strict=True)
    container = deployment["spec"]["template"]["spec"]["containers"][0]
    assert ("nvidia.com/gpu" in container["resources"]["limits"]) == bool(gpus)
    assert (monitor["apiVersion"], monitor["kind"]) == ("monitoring.coreos.com/v1", "PodMonitor")
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert monitor["spec"]["selector"]["matchLabels"] == service["spec"]["selector"] == labels
    ports = {port["name"] for port in container["ports"]}
    for endpoint in monitor["spec"]["podMetricsEndpoints"]:
        assert endpoint.keys() <= ENDPOINT_FIELDS and endpoint["port"] in ports
    assert service["spec"]["ports"][0]["targetPort"] in ports
    for group in rule["spec"]["groups"]:
        assert group.keys() == {"name", "interval", "rules"}
        assert all({"alert", "expr"} <= one.keys() <= RULE_FIELDS for one in group["rules"])


# The schemas of the operator's definitions, made into functions.
SCHEMAS = Path(__file__).parents[3] / "build/serving/schemas/node_modules/@kubernetes-models/prometheus-operator"
VALIDATE = """
const kinds = require(process.argv[1] + "/monitoring.coreos.com/v1");
const told = JSON.parse(require("fs").readFileSync(0)).map((one) => {
  try { new kinds[one.kind](one).validate(); return ""; } catch (error) { return error.message; }
});
console.log(JSON.stringify(told));
"""


def ask_operator(*objects):
    """What its schemas say of each object; "" where they accept it."""
    if not SCHEMAS.is_dir() or shutil.which("node") is None:
        pytest.skip("the operator's schemas are not installed: make serve-setup")
    words = ["node", "-e", VALIDATE, str(SCHEMAS)]
    done = subprocess.run(words, input=json.dumps(objects), capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.serving
@pytest.mark.parametrize("engine", ENGINES)
def test_the_operators_schemas_accept_them(engine):
    monitor, rule = make_manifests(settings(engine), AlarmSettings())[2:]
    often, numbered = json.loads(json.dumps([monitor, rule]))
    often["spec"]["podMetricsEndpoints"][0]["interval"] = "often"
    numbered["spec"]["groups"][0]["rules"][0]["labels"] = {"severity": 1}
    assert ask_operator(monitor, rule) == ["", ""]
    told = ask_operator(often, numbered)
    assert "interval must match pattern" in told[0] and "labels/severity must be string" in told[1]


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed; make test-serving brings it")
@pytest.mark.parametrize("engine", ENGINES)
def test_promtool_accepts_the_rules(engine, tmp_path):
    rule = make_manifests(settings(engine), AlarmSettings())[3]
    (tmp_path / "rules.yml").write_text(yaml.safe_dump(rule["spec"]))
    done = subprocess.run(["promtool", "check", "rules", tmp_path / "rules.yml"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_command_writes_one_file_and_refuses_wrong_names(tmp_path, capsys):
    words = ["monitor", "manifests", str(tmp_path / "moe.yaml"), "--engine", "vllm", "--image", "i", "--claim", "c"]
    assert main([*words, "--model", "demo", "--name", "moe"]) == 0
    kinds = [one["kind"] for one in yaml.safe_load_all((tmp_path / "moe.yaml").read_text())]
    assert kinds == ["Deployment", "Service", "PodMonitor", "PrometheusRule"]
    assert main([*words, "--model", "demo", "--name", "My Model"]) == 2
    assert main([*words, "--model", "demo", "--name", "moe", "--gpus", "-1"]) == 2
    assert "--gpus: got -1, expected at least 0" in capsys.readouterr().err
