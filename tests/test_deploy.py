"""The files under ``deploy/``: they parse, and what they name exists."""

from __future__ import annotations

import configparser
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml
from prometheus_client.parser import text_string_to_metric_families

from impasto.cli.serve import serve
from impasto.serving.http.app import create_app
from impasto.serving.http.metrics import Metrics
from impasto.serving.http.server import ANSWER_SECONDS
from impasto.serving.stub import StubService

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"


def options(arguments: list[str]) -> dict[str, str]:
    """The arguments of ``impasto serve``, all of which exist."""
    app = typer.Typer()
    app.command()(serve)
    command = typer.main.get_command(app)
    context = command.make_context("serve", list(arguments), resilient_parsing=False)
    assert context.args == []
    return {name: value for name, value in context.params.items() if value is not None}


def container() -> dict[str, list[str]]:
    """Arguments of the instructions of the container file, by name."""
    text = re.sub(r"\\\n\s*", "", (DEPLOY / "Containerfile").read_text("utf-8"))
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        if line and not line.startswith("#"):
            name, _, rest = line.partition(" ")
            found.setdefault(name, []).append(rest)
    return found


def manifests() -> dict[str, dict[str, Any]]:
    return {one["kind"]: one for one in yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text("utf-8"))}


def unit() -> configparser.SectionProxy:
    parser = configparser.RawConfigParser(strict=False, comment_prefixes=("#",), delimiters=("=",))
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read(DEPLOY / "impasto.service", "utf-8")
    return parser["Service"]


def test_the_container_copies_what_exists_and_starts_with_options_that_exist():
    found = container()
    for copied in found["COPY"]:
        *sources, _ = copied.split()
        if not sources[0].startswith("--from"):
            assert all((ROOT / source).exists() for source in sources)
    command = json.loads(found["ENTRYPOINT"][0]) + json.loads(found["CMD"][0])
    assert command[:2] == ["impasto", "serve"]
    given = options(command[2:])
    assert given["host"] == "0.0.0.0"
    assert given["api_key_file"] == Path("/run/secrets/impasto-keys")  # a public address needs keys
    assert found["EXPOSE"] == [str(given["port"])]
    assert found["USER"] == ["10001:10001"]
    for text in (DEPLOY / "Containerfile", ROOT / "docs" / "deploy.md"):
        (timeout,) = re.findall(r"--stop-timeout (\d+)", text.read_text("utf-8"))
        assert int(timeout) > given["drain"] + ANSWER_SECONDS
    pinned = re.search(r"^TORCH \?= (\S+)", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    assert pinned is not None
    assert f"TORCH={pinned[1]}" in found["ARG"]


def test_the_unit_drains_before_it_is_killed():
    service = unit()
    command = shlex.split(service["ExecStart"])
    assert command[0] == "/opt/impasto/bin/impasto"
    given = options(command[2:])
    assert given["host"] == "127.0.0.1"
    assert int(service["TimeoutStopSec"]) > given["drain"] + ANSWER_SECONDS
    assert service["KillMode"] == "mixed"
    assert service["ProtectSystem"] == "strict"
    assert "MemoryDenyWriteExecute" not in service  # oneDNN writes machine code


def test_the_pods_are_probed_and_drained():
    found = manifests()
    pod = found["Deployment"]["spec"]["template"]["spec"]
    (server,) = pod["containers"]
    given = options(json.loads(container()["ENTRYPOINT"][0])[2:] + server["args"])
    wait = int(server["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] > wait + given["drain"] + ANSWER_SECONDS
    assert wait >= server["readinessProbe"]["periodSeconds"] * server["readinessProbe"]["failureThreshold"]
    assert server["imagePullPolicy"] == "IfNotPresent"  # its tag is latest, which would be pulled
    threads = {one["name"]: one["value"] for one in server["env"]}["OMP_NUM_THREADS"]
    assert threads == server["resources"]["requests"]["cpu"]
    paths = set(create_app(StubService()).openapi()["paths"])
    probes = {name: server[name]["httpGet"] for name in ("startupProbe", "livenessProbe", "readinessProbe")}
    assert {probe["path"] for probe in probes.values()} <= paths
    assert probes["readinessProbe"]["path"] == "/ready"
    assert {probe["port"] for probe in probes.values()} == {"http"}
    assert server["ports"] == [{"name": "http", "containerPort": given["port"]}]
    (key_volume,) = [one for one in pod["volumes"] if "secret" in one]
    (mount,) = [one for one in server["volumeMounts"] if one["name"] == key_volume["name"]]
    assert given["api_key_file"] == Path(mount["mountPath"]) / "keys"
    labels = found["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert found["Service"]["spec"]["selector"] == labels
    assert found["Service"]["spec"]["sessionAffinity"] == "ClientIP"
    assert found["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels


def known_metrics() -> set[str]:
    """The names under which Prometheus finds the server's metrics."""
    metrics = Metrics(StubService())
    metrics.requests.labels("/", "GET", "200").inc()
    metrics.seconds.labels("/").observe(1)
    families = text_string_to_metric_families(metrics.text().decode())
    return {sample.name for family in families for sample in family.samples}


def test_the_dashboard_shows_metrics_that_exist():
    board = json.loads((DEPLOY / "grafana-dashboard.json").read_text("utf-8"))
    expressions = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    named = {name for expression in expressions for name in re.findall(r"\bimpasto_\w+", expression)}
    assert named <= known_metrics()
    plain = {re.sub(r"_(total|bucket|sum|count)$", "", name) for name in named}
    missing = {re.sub(r"_(total|bucket|sum|count|created)$", "", name) for name in known_metrics()} - plain
    assert not missing  # nothing that is counted is left out
    for expression in expressions:
        assert expression.count("(") == expression.count(")")
        assert expression.count("{") == expression.count("}")


def test_the_panels_do_not_overlap():
    board = json.loads((DEPLOY / "grafana-dashboard.json").read_text("utf-8"))
    places = [panel["gridPos"] for panel in board["panels"]]
    cells = [
        (x, y)
        for one in places
        for x in range(one["x"], one["x"] + one["w"])
        for y in range(one["y"], one["y"] + one["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24
    assert len({panel["id"] for panel in board["panels"]}) == len(places)


@pytest.mark.parametrize("name", ["Containerfile", "impasto.service", "kubernetes.yaml", "grafana-dashboard.json"])
def test_the_page_about_deployment_names_each_file(name: str):
    assert f"deploy/{name}" in (ROOT / "docs" / "deploy.md").read_text("utf-8")
