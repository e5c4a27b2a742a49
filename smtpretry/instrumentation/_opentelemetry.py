"""Spans and metrics for OpenTelemetry. Needs the extra ``opentelemetry``: the API; the SDK is the application's."""

from __future__ import annotations

import functools
from functools import partial
from typing import TYPE_CHECKING

try:
    from opentelemetry import metrics, trace
    from opentelemetry.metrics import Observation
    from opentelemetry.trace import SpanKind, Status, StatusCode
except ImportError as error:
    _message = "this hook needs opentelemetry-api: install smtpretry with its extra 'opentelemetry'"
    raise ImportError(_message, name=error.name) from error

from smtpretry.events import BrokenOff, Ended
from smtpretry.replies.reply import NO_REPLY

from ._metrics import ACCEPTANCE, BUCKETS, COUNTERS, GAUGES, Clients, acceptance, counts, gauges

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from opentelemetry.metrics import CallbackOptions, MeterProvider
    from opentelemetry.trace import Span, TracerProvider

    from smtpretry.delivery import Delivery
    from smtpretry.events import Event
    from smtpretry.outcome import Step
    from smtpretry.stats import Stats

Attributes = dict[str, str | int | float]

_NAME = "smtpretry"


@functools.cache  # an instrument can be made but once
def hook_for(tracer_provider: TracerProvider | None, meter_provider: MeterProvider | None) -> OpenTelemetryHook:
    """The hook of these providers."""
    return OpenTelemetryHook(tracer_provider, meter_provider)


class OpenTelemetryHook:
    """Makes a span of a delivery when it has ended: its attempts hold all that a span tells."""

    def __init__(self, tracer_provider: TracerProvider | None, meter_provider: MeterProvider | None) -> None:
        self._tracer = trace.get_tracer(_NAME, tracer_provider=tracer_provider)
        meter = metrics.get_meter(_NAME, meter_provider=meter_provider)
        self._counters = {
            name: meter.create_counter(f"smtpretry.{name}", description=about) for name, (about, _) in COUNTERS.items()
        }
        self._acceptance = meter.create_histogram(
            "smtpretry.acceptance", "s", ACCEPTANCE, explicit_bucket_boundaries_advisory=BUCKETS
        )
        self._clients = Clients()
        for name, (about, _) in GAUGES.items():
            stem, seconds, _ = name.partition("_seconds")
            meter.create_observable_gauge(
                f"smtpretry.{stem}", [partial(self._observe, name)], "s" if seconds else "", about
            )

    def __call__(self, delivery: Delivery | None, event: Event) -> None:
        """Count it; with the last end of a delivery, or where it is broken off, make the span."""
        for name, labels in counts(delivery, event):
            self._counters[name].add(1, dict(zip(COUNTERS[name][1], labels, strict=True)))
        if (taken := acceptance(event)) is not None:
            self._acceptance.record(taken.elapsed, {"server": taken.server})
        if delivery is not None and (isinstance(event, BrokenOff) or (isinstance(event, Ended) and not event.left)):
            self._trace(delivery, event)

    def watch(self, stats: Callable[[], Stats]) -> None:
        """Show a client's stats, too."""
        self._clients.watch(stats)

    def _observe(self, name: str, _: CallbackOptions) -> Iterable[Observation]:
        return [Observation(value, {"server": server}) for server, value in gauges(name, self._clients).items()]

    def _trace(self, delivery: Delivery, last: Ended | BrokenOff) -> None:
        server = next((one.server for one in reversed(delivery.attempts) if one.server), "")
        began = last.at if delivery.began_at is None else delivery.began_at
        span = self._tracer.start_span(
            f"send {server}".rstrip(),
            kind=SpanKind.CLIENT,
            attributes=_attributes(delivery, server),
            start_time=_nanoseconds(began),
        )
        for number, attempt in enumerate(delivery.attempts, start=1):
            about: Attributes = {"smtpretry.attempt": number, **_address(attempt.server)}
            span.add_event("attempt", about, _nanoseconds(attempt.at))
            for step in attempt.steps:
                span.add_event("reply", {"smtpretry.attempt": number, **_reply(step)}, _nanoseconds(step.at))
        _conclude(span, delivery, last)
        span.end(_nanoseconds(last.at))


def _attributes(delivery: Delivery, server: str) -> Attributes:
    return {
        "messaging.system": "smtp",
        "messaging.operation.name": "send",
        "messaging.operation.type": "send",
        "messaging.message.id": delivery.id,
        "messaging.message.body.size": len(delivery.message),
        **_address(server),
        "smtpretry.attempts": len(delivery.attempts),
        "smtpretry.recipients": len(delivery.outcomes),
        "smtpretry.accepted": len(delivery.accepted),
        "smtpretry.refused": len(delivery.refused),
        "smtpretry.uncertain": len(delivery.uncertain),
        "smtpretry.deferred": len(delivery.deferred),
        "smtpretry.pending": len(delivery.pending),
    }


def _address(server: str) -> Attributes:
    """Host and port apart, as the conventions have them."""
    host, colon, port = server.rpartition(":")
    if colon and port.isdecimal():
        return {"server.address": host.strip("[]"), "server.port": int(port)}
    return {"server.address": server} if server else {}


def _reply(step: Step) -> Attributes:
    """What was said and done, without the server's own words, which may name a recipient."""
    return {
        "smtpretry.stage": step.stage.value,
        "smtpretry.code": step.reply.code,
        "smtpretry.enhanced": step.reply.enhanced or "",
        "smtpretry.action": step.action.value if step.action else "OK",
        "smtpretry.row": step.row,
        "smtpretry.wait": step.wait,
        "smtpretry.recipients": len(step.recipients),
    }


def _conclude(span: Span, delivery: Delivery, last: Ended | BrokenOff) -> None:
    """The span has failed where somebody did not get the message, or where it was broken off."""
    if isinstance(last, BrokenOff):
        span.set_attribute("error.type", last.why)
        span.set_status(Status(StatusCode.ERROR, "broken off"))
    elif missed := [*delivery.refused.values()]:
        code = missed[-1].code
        span.set_attribute("error.type", "no_reply" if code == NO_REPLY else str(code))
        span.set_status(Status(StatusCode.ERROR, f"{len(missed)} refused"))
    elif delivery.uncertain:
        span.set_attribute("error.type", "uncertain")
        span.set_status(Status(StatusCode.ERROR, f"{len(delivery.uncertain)} uncertain"))


def _nanoseconds(at: float) -> int:
    return round(at * 1e9)
