"""Kubernetes, compose and the Dockerfile: what can be checked without a cluster and without a Docker engine."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from server.config import Settings, load_settings
from server.serve import LAST_WORDS_SECONDS

ROOT = Path(__file__).parents[2]
OVERLAYS = sorted((ROOT / "deploy" / "kubernetes" / "overlays").iterdir())
KUBERNETES = "1.33"

Json = dict[str, Any]


def built(overlay: Path) -> list[Json]:
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.fail("kubectl is missing: run `make tools` first, as `make test-slow` does")
    done = subprocess.run([kubectl, "kustomize", str(overlay)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")  # a warning says that a field goes away
    return list(yaml.safe_load_all(done.stdout))


def checked_settings(container: Json, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """What the server makes of its variables; it understands each."""
    for entry in container["env"]:
        if entry["name"].startswith("LORAMUX_"):
            monkeypatch.setenv(entry["name"], entry.get("value", "postgresql://database/loramux"))
    return load_settings()


@pytest.mark.slow
@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.name)
def test_every_overlay_is_valid_and_locked_down(overlay: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    objects = built(overlay)
    for entry in objects:
        kubernetes_validate.validate(entry, KUBERNETES, strict=True)
    by_kind = {entry["kind"]: entry for entry in objects}
    assert len({entry["metadata"].get("namespace") for entry in objects} - {None}) == 1
    assert all("namespace" in entry["metadata"] for entry in objects)
    assert {"Deployment", "Service", "PodDisruptionBudget", "NetworkPolicy", "ServiceAccount"} <= by_kind.keys()
    pod = by_kind["Deployment"]["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    (server,) = pod["containers"]
    for container in (server, *pod["initContainers"]):
        locked = container["securityContext"]
        assert (locked["readOnlyRootFilesystem"], locked["allowPrivilegeEscalation"]) == (True, False)
        assert locked["capabilities"] == {"drop": ["ALL"]}
    assert {"startupProbe", "readinessProbe", "livenessProbe"} <= server.keys()
    mounts = {mount["name"] for mount in server["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod["volumes"]}
    labels = by_kind["Deployment"]["spec"]["template"]["metadata"]["labels"]
    for selector in (
        by_kind["Service"]["spec"]["selector"],
        by_kind["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"],
    ):
        assert selector.items() <= labels.items()
    settings = checked_settings(server, monkeypatch)
    # A pod that must go has the time that its server takes, after gateways have heard of it.
    waited = int(server["lifecycle"]["preStop"]["exec"]["command"][1])
    assert waited > 0
    end = waited + settings.serve.shutdown_timeout + LAST_WORDS_SECONDS
    assert pod["terminationGracePeriodSeconds"] >= end + 5
    assert "--shutdown-timeout" not in server["args"], "an overlay that has arguments of its own would lose it"


@pytest.mark.slow
def test_replicas_keep_nothing_of_their_own() -> None:
    objects = built(ROOT / "deploy" / "kubernetes" / "overlays" / "many-replicas")
    by_kind = {entry["kind"]: entry for entry in objects}
    assert "PersistentVolumeClaim" not in by_kind
    deployment = by_kind["Deployment"]["spec"]
    assert deployment["strategy"]["type"] == "RollingUpdate"
    assert all("emptyDir" in volume for volume in deployment["template"]["spec"]["volumes"])
    names = {entry["name"] for entry in deployment["template"]["spec"]["containers"][0]["env"]}
    assert {"LORAMUX_SERVE__DATABASE_URL", "LORAMUX_SERVE__BLOB_URL"} <= names
    scaler = by_kind["HorizontalPodAutoscaler"]["spec"]
    assert "replicas" not in deployment  # else applying it again undoes what the autoscaler did
    assert scaler["scaleTargetRef"]["name"] == by_kind["Deployment"]["metadata"]["name"]


def test_compose_names_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = ROOT / "deploy" / "compose"
    compose = yaml.safe_load((folder / "compose.yaml").read_text())
    services, volumes = compose["services"], compose["volumes"]
    for service in services.values():
        assert set(service.get("depends_on", ())) <= services.keys()
        for mount in service.get("volumes", ()):
            source = mount.split(":")[0]
            assert (folder / source).exists() if source.startswith(".") else source in volumes
        assert re.fullmatch(r"[\w/.-]+:(?!latest)\S+", service["image"]), "a version that is tried is the one that runs"
    for name, value in services["loramux"]["environment"].items():
        if name.startswith("LORAMUX_"):
            monkeypatch.setenv(name, str(value))
    serve = load_settings().serve
    assert (serve.database_url or "").startswith("postgresql://")
    assert (serve.blob_url or "").startswith("s3://")
    scraped = yaml.safe_load((folder / "prometheus.yml").read_text())["scrape_configs"][0]["static_configs"][0][
        "targets"
    ]
    assert scraped == ["loramux:8000"]


@pytest.mark.slow
def test_prometheus_finds_the_pods_and_has_their_key(tmp_path: Path) -> None:
    job = yaml.safe_load((ROOT / "deploy" / "kubernetes" / "prometheus.yaml").read_text())[0]
    (pod,) = (entry for entry in built(OVERLAYS[0]) if entry["kind"] == "Deployment")
    (found,) = job.pop("kubernetes_sd_configs")  # which Debian's promtool was built without
    (selector,) = found["selectors"]
    wanted = dict(term.split("=") for term in selector["label"].split(","))
    assert wanted.items() <= pod["spec"]["template"]["metadata"]["labels"].items()
    (port,) = pod["spec"]["template"]["spec"]["containers"][0]["ports"]
    assert job["relabel_configs"][0] == {
        "source_labels": ["__meta_kubernetes_pod_container_port_name"],
        "regex": port["name"],
        "action": "keep",
    }
    assert job["job_name"] == "loramux"
    assert "authorization" in job
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.fail("promtool is missing: run `make tools` first, as `make test-slow` does")
    file = tmp_path / "prometheus.yml"
    file.write_text(yaml.safe_dump({"scrape_configs": [job]}))
    done = subprocess.run(
        [promtool, "check", "config", "--syntax-only", file], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_dockerfile_has_no_remarks() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, ROOT / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_images_hold_every_package_and_run_as_nobody() -> None:
    text = (ROOT / "Dockerfile").read_text()
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"loadtests"}
    assert packages == set(re.findall(r"^COPY (\w+) \1$", text, re.MULTILINE))
    assert re.findall(r"^USER (\S+)", text, re.MULTILINE) == ["10001", "10001"]
