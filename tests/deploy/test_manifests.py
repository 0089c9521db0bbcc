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

from server.config import load_settings

ROOT = Path(__file__).parents[2]
OVERLAYS = sorted((ROOT / "deploy" / "kubernetes" / "overlays").iterdir())
KUBERNETES = "1.33"

Json = dict[str, Any]


def built(overlay: Path) -> list[Json]:
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.fail("kubectl is missing: run `make tools` first, as `make test-slow` does")
    done = subprocess.run([kubectl, "kustomize", str(overlay)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def check_settings(container: Json, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server understands each of its variables and options."""
    for entry in container["env"]:
        if entry["name"].startswith("LORAMUX_"):
            monkeypatch.setenv(entry["name"], entry.get("value", "postgresql://database/loramux"))
    load_settings()


@pytest.mark.slow
@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.name)
def test_every_overlay_is_valid_and_locked_down(overlay: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    objects = built(overlay)
    for entry in objects:
        kubernetes_validate.validate(entry, KUBERNETES, strict=True)
    by_kind = {entry["kind"]: entry for entry in objects}
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
    check_settings(server, monkeypatch)


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


def test_the_dockerfile_has_no_remarks() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, ROOT / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_images_hold_every_package_and_run_as_nobody() -> None:
    text = (ROOT / "Dockerfile").read_text()
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"loadtests"}
    assert packages == set(re.findall(r"^COPY (\w+) \1$", text, re.MULTILINE))
    assert re.findall(r"^USER (\S+)", text, re.MULTILINE) == ["10001", "10001"]
