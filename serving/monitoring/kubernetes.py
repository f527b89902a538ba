"""Manifests for Kubernetes, where one machine is outgrown: Deployment, Service, PodMonitor and PrometheusRule.

`deepseek-moe monitor manifests` writes them, for our own endpoint, NVIDIA Triton or vLLM. PodMonitor and
PrometheusRule are the Prometheus operator's. The model lies on a volume that the cluster provides.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from deepseek_serving.monitoring.alarms import AlarmSettings, make_rules

_MOUNT = "/models"
ENGINES = ("endpoint", "triton", "vllm")
_NAME = re.compile(r"[a-z]([-a-z0-9]{0,50}[a-z0-9])?")


@dataclass(frozen=True)
class ManifestSettings:
    """What the manifests say.

    Attributes:
        engine: `endpoint`, `triton` or `vllm`.
        name: Of all objects.
        image: The container's; it holds the engine.
        claim: The PersistentVolumeClaim with the model or, for Triton, its repository.
        model: Its folder in the volume.
        replicas: Pods.
        gpus: Of each pod; 0: CPU.
        memory_gib: Of each pod.
        cpus: Of each pod.
    """

    engine: str
    name: str
    image: str
    claim: str
    model: str
    replicas: int = 1
    gpus: int = 0
    memory_gib: int = 16
    cpus: int = 4

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise ValueError(f"--engine: got {self.engine!r}, expected one of {', '.join(ENGINES)}")
        for option in ("name", "claim"):
            if not _NAME.fullmatch(getattr(self, option)):
                raise ValueError(
                    f"--{option}: got {getattr(self, option)!r}, expected lower-case letters, digits and '-'"
                )
        for option, least in (("replicas", 1), ("gpus", 0), ("memory_gib", 1), ("cpus", 1)):
            if getattr(self, option) < least:
                shown = option.replace("_", "-")
                raise ValueError(f"--{shown}: got {getattr(self, option)}, expected at least {least}")

    @property
    def model_path(self) -> str:
        """In the container."""
        return f"{_MOUNT}/{self.model}"


@dataclass(frozen=True)
class _Engine:
    command: list[str]
    port: int
    metrics_port: int
    ready: str
    live: str


def _describe_engine(settings: ManifestSettings) -> _Engine:
    path = settings.model_path
    if settings.engine == "endpoint":
        words = ["deepseek-moe", "serve", path, "--name", settings.name, "--host", "0.0.0.0", "--port", "8000"]
        words.append("--without-tls")  # inside the cluster; an ingress speaks TLS
        return _Engine(words, 8000, 8000, "/health", "/health")
    if settings.engine == "vllm":
        words = ["vllm", "serve", path, "--served-model-name", settings.name, "--host", "0.0.0.0", "--port", "8000"]
        if settings.gpus > 1:
            words += ["--tensor-parallel-size", str(settings.gpus)]
        return _Engine(words, 8000, 8000, "/health", "/health")
    words = ["tritonserver", f"--model-repository={path}", "--http-port=8000", "--metrics-port=8002"]
    return _Engine(words, 8000, 8002, "/v2/health/ready", "/v2/health/live")


def make_manifests(settings: ManifestSettings, alarms: AlarmSettings) -> list[dict[str, Any]]:
    """Return the four objects.

    Args:
        settings: What runs, and where.
        alarms: Thresholds.
    """
    engine = _describe_engine(settings)
    labels = {"app.kubernetes.io/name": settings.name}
    return [
        _make_deployment(settings, engine, labels),
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": settings.name, "labels": labels},
            "spec": {"selector": labels, "ports": [{"name": "http", "port": 80, "targetPort": "http"}]},
        },
        {
            "apiVersion": "monitoring.coreos.com/v1",
            "kind": "PodMonitor",
            "metadata": {"name": settings.name, "labels": labels},
            "spec": {
                "selector": {"matchLabels": labels},
                "podMetricsEndpoints": [_make_metrics_endpoint(settings)],
            },
        },
        {
            "apiVersion": "monitoring.coreos.com/v1",
            "kind": "PrometheusRule",
            "metadata": {"name": settings.name, "labels": labels},
            "spec": _make_rules(settings, alarms),
        },
    ]


def _make_deployment(settings: ManifestSettings, engine: _Engine, labels: dict[str, str]) -> dict[str, Any]:
    amounts = {"cpu": str(settings.cpus), "memory": f"{settings.memory_gib}Gi"}
    if settings.gpus:
        amounts["nvidia.com/gpu"] = str(settings.gpus)
    ports = [{"name": "http", "containerPort": engine.port}]
    if engine.metrics_port != engine.port:
        ports.append({"name": "metrics", "containerPort": engine.metrics_port})
    container: dict[str, Any] = {
        "name": "server",
        "image": settings.image,
        "command": engine.command,
        "ports": ports,
        "resources": {"requests": amounts, "limits": {name: amounts[name] for name in amounts if name != "cpu"}},
        "readinessProbe": {"httpGet": {"path": engine.ready, "port": "http"}, "periodSeconds": 5},
        "livenessProbe": {"httpGet": {"path": engine.live, "port": "http"}, "periodSeconds": 10},
        # Loading a large model takes its time; until then the other probes wait.
        "startupProbe": {
            "httpGet": {"path": engine.live, "port": "http"},
            "periodSeconds": 10,
            "failureThreshold": 180,
        },
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
        "volumeMounts": [{"name": "models", "mountPath": _MOUNT, "readOnly": True}],
        "env": [{"name": "HF_HUB_OFFLINE", "value": "1"}],
    }
    if settings.engine != "triton":
        variable = "DEEPSEEK_MOE_API_KEY" if settings.engine == "endpoint" else "VLLM_API_KEY"
        secret = {"secretKeyRef": {"name": settings.name, "key": "api-key"}}
        container["env"].append({"name": variable, "valueFrom": secret})
    claim = {"name": "models", "persistentVolumeClaim": {"claimName": settings.claim, "readOnly": True}}
    pod = {
        "containers": [container],
        "volumes": [claim],
        "automountServiceAccountToken": False,
        # What runs is finished within the server's own grace time of 20 s.
        "terminationGracePeriodSeconds": 60,
    }
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": settings.name, "labels": labels},
        "spec": {
            "replicas": settings.replicas,
            "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": pod},
        },
    }


def _make_metrics_endpoint(settings: ManifestSettings) -> dict[str, Any]:
    endpoint: dict[str, Any] = {"port": "metrics" if settings.engine == "triton" else "http", "path": "/metrics"}
    endpoint["interval"] = "15s"
    if settings.engine == "endpoint":
        endpoint["authorization"] = {"credentials": {"name": settings.name, "key": "api-key"}}
    return endpoint


def _make_rules(settings: ManifestSettings, alarms: AlarmSettings) -> dict[str, Any]:
    job = f'job="{settings.name}"'
    if settings.engine == "endpoint":
        text = yaml.safe_dump(make_rules(alarms), width=1000).replace('job="deepseek-moe"', job)
        rules: dict[str, Any] = yaml.safe_load(text)
        return rules
    of_engine = {
        "vllm": f'1 - sum(rate(vllm:e2e_request_latency_seconds_bucket{{le="{alarms.latency_s:g}"}}[1m])) '
        "/ sum(rate(vllm:e2e_request_latency_seconds_count[1m])) > 0.05",
        # Triton counts no latencies by bucket: the mean stands in.
        "triton": "sum(rate(nv_inference_request_duration_us[1m])) / sum(rate(nv_inference_request_success[1m])) "
        f"> {alarms.latency_s * 1e6:g}",
    }
    rules_of_engine = [
        {
            "alert": "SlowRequests",
            "expr": of_engine[settings.engine],
            "for": "1m",
            "labels": {"severity": "critical"},
            "annotations": {"summary": "requests are slow"},
        },
        {
            "alert": "ServerDown",
            "expr": f"up{{{job}}} == 0",
            "for": "1m",
            "labels": {"severity": "critical"},
            "annotations": {"summary": "{{ $labels.instance }} does not answer"},
        },
    ]
    return {"groups": [{"name": f"{settings.name}-{settings.engine}", "interval": "15s", "rules": rules_of_engine}]}


def write_manifests(path: Path, settings: ManifestSettings, alarms: AlarmSettings) -> None:
    """Write the four objects into one file.

    Args:
        path: The file.
        settings: What runs, and where.
        alarms: Thresholds.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    objects = make_manifests(settings, alarms)
    path.write_text(yaml.safe_dump_all(objects, sort_keys=False, width=1000), encoding="utf-8")
