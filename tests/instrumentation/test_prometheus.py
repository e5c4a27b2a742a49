"""The metrics for Prometheus, as a scrape over HTTP shows them."""

from __future__ import annotations

import asyncio
import gc
import json
import subprocess
import sys
import urllib.request
from typing import TYPE_CHECKING, Any

import pytest
from prometheus_client import REGISTRY, CollectorRegistry, start_http_server
from prometheus_client.parser import text_string_to_metric_families
from support import ANN, BOB, CAT, GREYLISTED, letter, patient, virtually

from smtpretry import Action, Failover, RetryingSMTP, RetryPolicy, Rule, instrumentation
from smtpretry.testing import ScriptedServer

if TYPE_CHECKING:
    from collections.abc import Iterator

UNKNOWN = "550 5.1.1 No such user"
DOWN = "421 4.3.2 Service shutting down"
Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


class Scraped:
    """A registry that is served over HTTP, and what a scrape of it says."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._server, self._thread = start_http_server(0, "127.0.0.1", self.registry)

    def scrape(self) -> Samples:
        with urllib.request.urlopen(f"http://127.0.0.1:{self._server.server_port}/metrics") as page:
            families = text_string_to_metric_families(page.read().decode())
            return {
                (one.name, tuple(sorted(one.labels.items()))): one.value
                for family in families
                for one in family.samples
            }

    def get(self, name: str, **labels: Any) -> float | None:
        return self.scrape().get((name, tuple(sorted(labels.items()))))

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture(name="metrics")
def _metrics() -> Iterator[Scraped]:
    scraped = Scraped()
    yield scraped
    scraped.close()


def here_and_there(**settings: Any) -> RetryPolicy:
    """Return a policy whose clock the thread of the scrape can read, too."""
    return patient(clock=asyncio.get_running_loop().clock, **settings)  # type: ignore[attr-defined] # a virtual loop


def at(server: ScriptedServer) -> str:
    return f"{server.hostname}:{server.port}"


@virtually
async def test_what_a_scrape_shows(metrics: Scraped) -> None:
    """Replies by stage, code, action and row; ends by status; the time to acceptance: counted for each recipient."""
    policy = here_and_there(
        rules=(
            Rule(name="no-such-user", code=550, action=Action.FAIL),
            Rule(name="later", code=450, action=Action.RETRY),
        )
    )
    hook = instrumentation.prometheus(metrics.registry)
    async with ScriptedServer() as server, RetryingSMTP(server.client(), policy, on_step=hook) as smtp:
        server.on("RCPT", BOB, UNKNOWN)
        server.on("RCPT", CAT, "450 4.2.0 Greylisted for 300 seconds", times=1)
        await smtp.deliver(letter(ANN, BOB, CAT))
        here = {"server": at(server)}
        refused = {"stage": "RCPT", "code": "550", "action": "FAIL", "row": "no-such-user"}
        retried = {"stage": "RCPT", "code": "450", "action": "RETRY", "row": "later"}
        taken = {"stage": "END_OF_DATA", "code": "250", "action": "OK", "row": ""}
        assert metrics.get("smtpretry_replies_total", **here, **refused) == 1
        assert metrics.get("smtpretry_replies_total", **here, **retried) == 1
        assert metrics.get("smtpretry_replies_total", **here, **taken) == 2
        assert metrics.get("smtpretry_recipients_total", **here, status="ACCEPTED") == 2
        assert metrics.get("smtpretry_recipients_total", **here, status="REFUSED") == 1
        assert metrics.get("smtpretry_acceptance_seconds_count", **here) == 2
        assert metrics.get("smtpretry_acceptance_seconds_bucket", **here, le="0.05") == 1
        assert metrics.get("smtpretry_acceptance_seconds_bucket", **here, le="600.0") == 2
        assert metrics.get("smtpretry_connections_opened_total", **here) == 2  # the first one was idle for too long
        assert metrics.get("smtpretry_connections_closed_total", **here) == 1


@virtually
async def test_gauges_tell_what_is_now(metrics: Scraped) -> None:
    """Who waits, for how long the server is left alone, and the open connections are those of the moment of the scrape."""
    hook = instrumentation.prometheus(metrics.registry)
    async with ScriptedServer() as server, RetryingSMTP(server.client(), here_and_there(), on_step=hook) as smtp:
        here = {"server": at(server)}
        server.on("CONNECT", DOWN, times=1)
        sends = [asyncio.ensure_future(smtp.deliver(letter(ANN))) for _ in range(7)]
        await asyncio.sleep(20)
        assert metrics.get("smtpretry_waiting", **here) == 7
        assert 40 <= (metrics.get("smtpretry_pause_seconds", **here) or 0) <= 46
        assert metrics.get("smtpretry_connections_open", **here) == 0
        await asyncio.gather(*sends)
        assert metrics.get("smtpretry_waiting", **here) == 0
        assert metrics.get("smtpretry_pause_seconds", **here) == 0
        assert metrics.get("smtpretry_connections_open", **here) == 1
        assert metrics.get("smtpretry_connections_in_use", **here) == 0
        assert metrics.get("smtpretry_pauses_total", **here) == 1


@virtually
async def test_silence_and_a_send_that_is_broken_off(metrics: Scraped) -> None:
    """Where no reply came, the code says so; who cancels a send finds it counted."""
    hook = instrumentation.prometheus(metrics.registry)
    async with ScriptedServer() as server, RetryingSMTP(server.client(), here_and_there(), on_step=hook) as smtp:
        server.fail_at("CONNECT", "fin")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(5):
                await smtp.deliver(letter(ANN))
        silences = [dict(labels) for name, labels in metrics.scrape() if name == "smtpretry_replies_total"]
        assert [(one["stage"], one["code"]) for one in silences] == [("CONNECT", "none")]
        assert metrics.get("smtpretry_broken_off_total") == 1
        server.clear()


@virtually
async def test_several_clients_share_a_registry(metrics: Scraped) -> None:
    """Two clients of two servers are told apart, two of the same are added up; a client that is gone is not asked."""
    first, second = ScriptedServer(), ScriptedServer()
    async with first, second:

        def client(server: ScriptedServer) -> RetryingSMTP:
            return RetryingSMTP(server.client(), here_and_there(), on_step=instrumentation.prometheus(metrics.registry))

        gone = client(second)
        async with Failover(client(first), client(second)) as smtp, client(first) as other:
            first.on("MAIL", DOWN, times=2)
            await smtp.deliver(letter(ANN))
            assert metrics.get("smtpretry_recipients_total", server=at(second), status="ACCEPTED") == 1
            assert (metrics.get("smtpretry_pause_seconds", server=at(first)) or 0) > 50
            await other.connect()
            assert metrics.get("smtpretry_connections_open", server=at(first)) == 1
        del gone, smtp, other
        gc.collect()
        assert metrics.get("smtpretry_waiting", server=at(first)) is None
        first.clear()


@virtually
async def test_no_label_names_a_person(metrics: Scraped) -> None:
    """A thousand recipients leave as many time series as one: labels are few, and none is an address."""
    hook = instrumentation.prometheus(metrics.registry)
    async with ScriptedServer() as server, RetryingSMTP(server.client(), here_and_there(), on_step=hook) as smtp:
        server.on("RCPT", "*1@example.com", UNKNOWN)
        await smtp.deliver(letter(ANN, "user1@example.com"))
        before = len(metrics.scrape())
        await smtp.deliver(letter(*(f"user{number}@example.com" for number in range(1000))))
        after = metrics.scrape()
        assert len(after) == before
        assert "@" not in repr(after)
        server.clear()


@virtually
async def test_it_costs_no_send_when_it_cannot_count(metrics: Scraped, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the metrics fail, the message goes all the same."""

    def broken(*_: object) -> None:
        raise MemoryError

    hook: Any = instrumentation.prometheus(metrics.registry)
    monkeypatch.setitem(hook._counters, "replies", type("Broken", (), {"labels": broken})())
    async with ScriptedServer() as server, RetryingSMTP(server.client(), here_and_there(), on_step=hook) as smtp:
        server.on("RCPT", BOB, GREYLISTED, times=1)
        assert (await smtp.deliver(letter(ANN, BOB))).accepted == [ANN, BOB]


def test_the_default_registry() -> None:
    """Without a registry it is prometheus_client's own; asked for twice, it is one hook, not an error."""
    hook = instrumentation.prometheus()
    assert hook is instrumentation.prometheus(REGISTRY)
    assert hook is instrumentation.prometheus()
    assert "smtpretry_recipients" in {family.name for family in REGISTRY.collect()}


@pytest.mark.parametrize(
    ("extra", "package"),
    [("prometheus", "prometheus_client"), ("opentelemetry", "opentelemetry"), ("structlog", "structlog")],
)
def test_without_its_package(extra: str, package: str) -> None:
    """Where the package is missing, the error names the command that installs it; the rest of smtpretry needs none of them."""
    code = f"""
import json, sys
import smtpretry.instrumentation
loaded = {package!r} in sys.modules
sys.modules[{package!r}] = None
try:
    smtpretry.instrumentation.{extra}()
except ImportError as error:
    print(json.dumps([loaded, str(error)]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded, message = json.loads(done.stdout)
    assert not loaded
    assert f"install smtpretry with its extra '{extra}'" in message
