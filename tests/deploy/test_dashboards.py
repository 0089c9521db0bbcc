"""The Grafana dashboard and the alert rules, against what the server really exports."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from adapters_store.registry import Resolved
from adapters_store.types import Composition, Mix
from routing.router import Route, RoutedAdapter
from server.engine.config import EngineStats
from server.journal import Ending
from server.metrics import Metrics

DASHBOARDS = Path(__file__).parents[2] / "deploy" / "dashboards"
SERIES = re.compile(r"\b(loramux_\w+)(?:\{([^}]*)\})?")
BY = re.compile(r"\bby \(([^)]*)\)")
OURS = {"job", "instance"}
"""Labels that Prometheus adds."""


@pytest.fixture(scope="module")
def exported() -> dict[str, set[str]]:
    """Labels by series name, of metrics in which everything has happened once."""
    metrics = Metrics()
    adapter = RoutedAdapter(Resolved("acme", "sql", "digest", True, "config", "weights"), 1.0, score=0.9)
    route = Route("retriever", (adapter,), Composition.MIXTURE, Mix(), 0.01, cached=True, best=0.9)
    metrics.begin(route)
    metrics.routed(route, "acme")
    metrics.route_failed("retriever")
    metrics.gap("acme", route, 0.1)
    metrics.quota_rejected("acme", "requests")
    metrics.embedded("acme", 3)
    metrics.registered(1)
    metrics.answered("GET", "/v1/models", 200)
    metrics.watch("0", lambda: True)
    stats = EngineStats(running=1, adapter_loads=1, adapter_reads=(0.1,), steps=((0.1, 2),), pages={"free": 1})
    metrics.engine(stats, 0.0)
    metrics.end(Ending("acme", route, "stop", 1, 1, 1.0, 0.1, 0.1, 0.1, 0.1))
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(generate_latest(metrics.registry).decode()):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def dashboard() -> dict[str, Any]:
    read: dict[str, Any] = json.loads((DASHBOARDS / "loramux.json").read_text())
    return read


def expressions() -> Iterator[tuple[str, str]]:
    for panel in dashboard()["panels"]:
        for target in panel["targets"]:
            yield panel["title"], target["expr"]
    for variable in dashboard()["templating"]["list"]:
        if variable["type"] == "query":
            yield variable["name"], variable["query"]["query"]
    for group in yaml.safe_load((DASHBOARDS / "alerts.yml").read_text())["groups"]:
        for rule in group["rules"]:
            yield rule["alert"], rule["expr"]


@pytest.mark.parametrize(("where", "expression"), [pytest.param(w, e, id=f"{w}: {e[:40]}") for w, e in expressions()])
def test_every_series_and_label_is_exported(where: str, expression: str, exported: dict[str, set[str]]) -> None:
    used = SERIES.findall(expression)
    assert used or re.match(r"(absent\()?up\{", expression), where
    known = set(OURS)
    for name, selector in used:
        assert name in exported, f"{where}: {name}"
        labels = set(re.findall(r"(\w+)=", selector))
        assert labels <= exported[name] | OURS, f"{where}: {name}"
        known |= exported[name]
    for clause in BY.findall(expression):
        assert {label.strip() for label in clause.split(",")} <= known, where


def test_panels_stand_apart_and_show_what_the_legend_names() -> None:
    panels = dashboard()["panels"]
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels]
    assert len(set(places)) == len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        for target in panel["targets"]:
            named = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            kept = {label.strip() for clause in BY.findall(target["expr"]) for label in clause.split(",")}
            aggregated = re.search(r"\b(?:sum|topk|histogram_quantile)\b", target["expr"])
            assert named <= (kept if aggregated else kept | named), panel["title"]


def test_operations_say_what_to_do_about_each_alert() -> None:
    text = (DASHBOARDS.parents[1] / "docs" / "operations.md").read_text()
    rules = yaml.safe_load((DASHBOARDS / "alerts.yml").read_text())["groups"][0]["rules"]
    assert re.findall(r"^\| `(Loramux\w+)` \|", text, re.MULTILINE) == [rule["alert"] for rule in rules]
    titles = {panel["title"] for panel in dashboard()["panels"]}
    named = set(re.findall(r'"([A-Z][^"]+)"', text[text.index("| alert |") : text.index("**Logs**")]))
    assert {name for name in named if not any(title.startswith(name) for title in titles)} == set()


@pytest.mark.slow
def test_alerts_fire_as_written_down() -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.fail("promtool is missing: run `make tools` first, as `make test-slow` does")
    done = subprocess.run(
        [promtool, "test", "rules", "alerts_test.yml"], cwd=DASHBOARDS, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rules = yaml.safe_load((DASHBOARDS / "alerts.yml").read_text())["groups"][0]["rules"]
    tested = yaml.safe_load((DASHBOARDS / "alerts_test.yml").read_text())["tests"][0]["alert_rule_test"]
    assert {rule["alert"] for rule in rules} == {test["alertname"] for test in tested if test["exp_alerts"]}
