"""The Grafana dashboard shows the metrics that the FastAPI example exports, and no others."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from support import ANN, BOB, letter, patient, virtually

from smtpretry import RetryingSMTP, instrumentation
from smtpretry.instrumentation import __doc__ as about
from smtpretry.testing import ScriptedServer

DASHBOARD = json.loads((Path(__file__).parents[2] / "examples" / "dashboard.json").read_text(encoding="utf-8"))
NAME = re.compile(r"\bsmtpretry_\w+")
LABELS = re.compile(r"(\w+)(?:=~|!=|=)\"|by \(([\w, ]+)\)|\{\{(\w+)\}\}")


def texts(value: Any) -> list[str]:
    """Return every text in it that names a metric."""
    if isinstance(value, dict):
        return [text for one in value.values() for text in texts(one)]
    if isinstance(value, list):
        return [text for one in value for text in texts(one)]
    return [value] if isinstance(value, str) and NAME.search(value) else []


def exported() -> dict[str, set[str]]:
    """Return the names of the samples, as a scrape after a send has them, each with the names of its labels."""
    registry = CollectorRegistry()

    @virtually
    async def send() -> None:
        hook = instrumentation.prometheus(registry)
        async with ScriptedServer() as server, RetryingSMTP(server.client(), patient(), on_step=hook) as smtp:
            server.on("RCPT", BOB, "550 5.1.1 No such user")
            server.on("CONNECT", "421 4.3.2 Too busy", times=1)
            await smtp.deliver(letter(ANN, BOB))
            page.append(generate_latest(registry).decode())

    page = list[str]()
    send()
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(page[0]):
        name = family.name + "_total" * (family.type == "counter")
        found.setdefault(name, {"server"})  # a family without a sample: the pace, where there is no limit
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def test_it_shows_what_is_exported() -> None:
    """Each metric and each label in a query of the dashboard is one that a scrape shows; each metric is shown."""
    metrics = exported()
    queries = texts([DASHBOARD["panels"], DASHBOARD["templating"]])
    named = {name for text in queries for name in NAME.findall(text)}
    assert named <= metrics.keys()
    assert {name.rpartition("_seconds")[0] or name for name in metrics if not name.endswith("_created")} == {
        name.rpartition("_seconds")[0] or name for name in named
    }
    labels = {label for metric in named for label in metrics[metric]}
    used = {
        label.strip()
        for panel in DASHBOARD["panels"]
        for target in panel["targets"]
        for groups in LABELS.findall(target["expr"] + target["legendFormat"])
        for group in groups
        for label in group.split(",")
        if group
    }
    assert used <= labels
    assert {"server", "status", "stage", "code", "row", "action"} <= used


def test_the_metrics_are_documented() -> None:
    """The package's docstring names each metric, and no other."""
    documented = set(NAME.findall(about or ""))
    samples = [name for name in exported() if not name.endswith("_created")]
    assert documented == {re.sub(r"_(bucket|count|sum)$", "", name) for name in samples}


@pytest.mark.parametrize("panel", DASHBOARD["panels"], ids=lambda panel: panel["title"])
def test_each_panel_says_what_it_shows(panel: dict[str, Any]) -> None:
    """Whoever is on call reads what a panel means, and its queries go to the data source that was chosen."""
    assert panel["title"]
    assert panel["description"]
    assert panel["datasource"]["uid"] == "${datasource}"
    assert all(target["expr"] and target["legendFormat"] for target in panel["targets"])


def test_panels_do_not_overlap() -> None:
    """Each place of the grid has one panel."""
    taken = [
        (x, y)
        for panel in DASHBOARD["panels"]
        for grid in [panel["gridPos"]]
        for x in range(grid["x"], grid["x"] + grid["w"])
        for y in range(grid["y"], grid["y"] + grid["h"])
    ]
    assert len(taken) == len(set(taken))
    assert max(x for x, _ in taken) < 24
