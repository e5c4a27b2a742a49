"""Spans and metrics for OpenTelemetry, as the real SDK exports them."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
import virtual
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from support import ANN, BOB, CAT, PASSWORD, USER, letter, patient, virtually

from smtpretry import Blocking, Delivery, RetryingSMTP, instrumentation, prepare
from smtpretry.testing import ScriptedServer, ThreadedServer

if TYPE_CHECKING:
    from collections.abc import Iterator

UNKNOWN = f"550 5.1.1 <{BOB}> No such user"
DOWN = "421 4.3.2 Service shutting down"


class Telemetry:
    """The SDK with exporters that keep what they get."""

    def __init__(self) -> None:
        self.exporter, self.reader = InMemorySpanExporter(), InMemoryMetricReader()
        self.tracers, self.meters = TracerProvider(shutdown_on_exit=False), MeterProvider([self.reader])
        self.tracers.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.hook = instrumentation.opentelemetry(self.tracers, self.meters)

    @property
    def spans(self) -> list[ReadableSpan]:
        return list(self.exporter.get_finished_spans())

    def metrics(self) -> dict[str, list[tuple[dict[str, Any], Any]]]:
        data = self.reader.get_metrics_data()
        assert data
        return {
            metric.name: [(dict(point.attributes or {}), point) for point in metric.data.data_points]
            for resource in data.resource_metrics
            for scope in resource.scope_metrics
            for metric in scope.metrics
        }


@pytest.fixture(name="telemetry")
def _telemetry() -> Iterator[Telemetry]:
    telemetry = Telemetry()
    yield telemetry
    telemetry.meters.shutdown()
    telemetry.tracers.shutdown()


@virtually
async def test_a_span_for_each_send(telemetry: Telemetry) -> None:
    """One send of three attempts is one span, from the first try to the last end, with an event for each attempt and reply."""
    async with ScriptedServer() as server, RetryingSMTP(server.client(), patient(), on_step=telemetry.hook) as smtp:
        server.on("RCPT", CAT, "450 4.2.0 Greylisted for 300 seconds", times=2)
        delivery = await smtp.deliver(letter(ANN, CAT))
        [span] = telemetry.spans
        assert span.name == f"send {server.hostname}:{server.port}"
        assert span.kind is SpanKind.CLIENT
        assert span.status.status_code is StatusCode.UNSET
        assert span.start_time == round(virtual.EPOCH * 1e9)
        assert span.end_time is not None
        assert 600 <= (span.end_time - span.start_time) / 1e9 < 601
        attributes = dict(span.attributes or {})
        assert attributes["messaging.system"] == "smtp"
        assert attributes["messaging.operation.name"] == attributes["messaging.operation.type"] == "send"
        assert attributes["messaging.message.id"] == delivery.id
        assert (attributes["server.address"], attributes["server.port"]) == (server.hostname, server.port)
        assert (attributes["smtpretry.attempts"], attributes["smtpretry.accepted"]) == (3, 2)
        assert [event.name for event in span.events] == [
            "attempt",
            "reply",
            "reply",
            "attempt",
            "reply",
            "attempt",
            "reply",
        ]
        assert [event.timestamp for event in span.events if event.name == "attempt"] == [
            round(attempt.at * 1e9) for attempt in delivery.attempts
        ]
        first = dict(span.events[1].attributes or {})
        assert (first["smtpretry.stage"], first["smtpretry.code"], first["smtpretry.action"]) == ("RCPT", 450, "RETRY")
        assert first["smtpretry.row"] == delivery.attempts[0].steps[0].row


@virtually
async def test_no_span_names_a_person(telemetry: Telemetry) -> None:
    """No address, no message, no credential and none of the server's own words, which may hold them."""
    options: dict[str, Any] = {"username": USER, "password": PASSWORD, "on_step": telemetry.hook}
    async with (
        ScriptedServer(auth=(USER, PASSWORD)) as server,
        RetryingSMTP(server.client(), patient(), **options) as smtp,
    ):
        server.on("RCPT", BOB, UNKNOWN)
        await smtp.deliver(letter(ANN, BOB))
        exported = "".join(span.to_json() for span in telemetry.spans) + repr(telemetry.metrics())
        for secret in ("@", USER, PASSWORD, "hello", "How are you", "No such user"):
            assert secret not in exported


@virtually
async def test_a_span_belongs_to_the_one_around_it(telemetry: Telemetry) -> None:
    """Sends of several requests at the same time are children each of its own request."""
    tracer = telemetry.tracers.get_tracer("app")
    async with ScriptedServer() as server, RetryingSMTP(server.client(), patient(), on_step=telemetry.hook) as smtp:
        server.on("RCPT", "450 4.2.0 Greylisted", times=5)

        async def request(number: int) -> tuple[int, str]:
            with tracer.start_as_current_span(f"request {number}") as span:
                delivery = await smtp.deliver(letter(f"user{number}@example.com"))
                return span.get_span_context().span_id, delivery.id

        pairs = await asyncio.gather(*(request(number) for number in range(10)))
    found = [
        (span.parent.span_id, (span.attributes or {})["messaging.message.id"])
        for span in telemetry.spans
        if span.parent is not None
    ]
    assert sorted(found) == sorted(pairs)  # type: ignore[type-var]


@pytest.mark.parametrize("trouble", ["refused", "silence", "uncertain", "cancelled"])
@virtually
async def test_a_span_that_failed(trouble: str, telemetry: Telemetry) -> None:
    """Who did not get the message, or who broke the send off, makes it an error, with its type."""
    policy = patient(on_uncertain="raise", give_up_after=timedelta(minutes=2))
    async with ScriptedServer() as server, RetryingSMTP(server.client(), policy, on_step=telemetry.hook) as smtp:
        match trouble:
            case "refused":
                server.on("RCPT", BOB, UNKNOWN)
            case "silence":
                server.fail_at("CONNECT", "fin")
            case "uncertain":
                server.fail_at("END_OF_DATA", "fin", times=1)
            case "cancelled":
                server.on("RCPT", "450 4.2.0 Greylisted")
        try:
            async with asyncio.timeout(30 if trouble == "cancelled" else None):
                await smtp.deliver(letter(ANN, BOB))
        except TimeoutError:
            assert trouble == "cancelled"
        server.clear()
    [span] = telemetry.spans
    assert span.status.status_code is StatusCode.ERROR
    expected = {"refused": "550", "silence": "no_reply", "uncertain": "uncertain", "cancelled": "CancelledError"}
    assert (span.attributes or {})["error.type"] == expected[trouble]


@virtually
async def test_a_delivery_that_comes_out_of_a_queue(telemetry: Telemetry) -> None:
    """What another process began is one span here too, from its first try on."""
    async with ScriptedServer() as server:
        server.on("RCPT", "450 4.2.0 Greylisted for 60 seconds", times=1)
        async with RetryingSMTP(server.client(), patient()) as smtp:
            delivery = await smtp.attempt(prepare(letter(ANN)))
        delivery = Delivery.from_dict(delivery.to_dict())
        await asyncio.sleep(61)
        async with RetryingSMTP(server.client(), patient(), on_step=telemetry.hook) as smtp:
            await smtp.attempt(delivery)
    [span] = telemetry.spans
    assert span.start_time == round(virtual.EPOCH * 1e9)
    assert [event.name for event in span.events] == ["attempt", "reply"] * 2


@virtually
async def test_metrics(telemetry: Telemetry) -> None:
    """The same metrics as for Prometheus, with the same labels."""
    async with ScriptedServer() as server, RetryingSMTP(server.client(), patient(), on_step=telemetry.hook) as smtp:
        here = {"server": f"{server.hostname}:{server.port}"}
        server.on("RCPT", BOB, UNKNOWN)
        await smtp.deliver(letter(ANN, BOB))
        server.on("MAIL", DOWN, times=2)
        send = asyncio.ensure_future(smtp.deliver(letter(ANN)))
        await asyncio.sleep(10)
        metrics = telemetry.metrics()
        assert [(labels, point.value) for labels, point in metrics["smtpretry.waiting"]] == [(here, 1)]
        [(labels, pause)] = metrics["smtpretry.pause"]
        assert labels == here
        assert 50 <= pause.value <= 56
        await send
        metrics = telemetry.metrics()
        ends = {labels["status"]: point.value for labels, point in metrics["smtpretry.recipients"]}
        assert ends == {"ACCEPTED": 2, "REFUSED": 1}
        [(labels, histogram)] = metrics["smtpretry.acceptance"]
        assert (labels, histogram.count) == (here, 2)
        assert {"server", "stage", "code", "action", "row"} == metrics["smtpretry.replies"][0][0].keys()


def test_one_hook_for_the_same_providers(telemetry: Telemetry) -> None:
    """Asked for twice, it is one hook: an instrument is made but once."""
    assert instrumentation.opentelemetry(telemetry.tracers, telemetry.meters) is telemetry.hook
    assert instrumentation.opentelemetry() is instrumentation.opentelemetry()


@virtually
async def test_without_an_sdk() -> None:
    """Where the application has set up no SDK, nothing is exported and nothing is wrong."""
    hook = instrumentation.opentelemetry()
    async with ScriptedServer() as server, RetryingSMTP(server.client(), patient(), on_step=hook) as smtp:
        assert (await smtp.deliver(letter(ANN))).accepted == [ANN]


def test_blocking_code(telemetry: Telemetry) -> None:
    """Where the loop runs in a thread of its own, a send still belongs to the span around the call."""
    with (
        ThreadedServer() as server,
        Blocking(server.client(), on_step=telemetry.hook) as smtp,
        telemetry.tracers.get_tracer("app").start_as_current_span("request") as request,
    ):
        smtp.deliver(letter(ANN))
    sent = next(span for span in telemetry.spans if span.name.startswith("send"))
    assert sent.parent
    assert sent.parent.span_id == request.get_span_context().span_id
