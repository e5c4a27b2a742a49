"""Hooks for `on_step=` that tell Prometheus, OpenTelemetry or structlog what a client does.

    from smtpretry import RetryingSMTP, instrumentation

    smtp = RetryingSMTP(client, on_step=instrumentation.prometheus())

Each needs the extra of its name, and imports it when it is called. The metrics, with the same names everywhere but for
the dots of OpenTelemetry (``smtpretry.replies``), and labels that are few, never an address:

    smtpretry_replies_total             replies that decided something, by server, stage, code, action and row
    smtpretry_recipients_total          recipients that have their end, by server and status
    smtpretry_acceptance_seconds        from the first try to the acceptance, a histogram by server
    smtpretry_pauses_total              pauses that began or were prolonged, by server
    smtpretry_broken_off_total          sends that were cancelled, or whose client was closed
    smtpretry_connections_opened_total  connections that were opened, by server
    smtpretry_connections_closed_total  connections that were closed, by server
    smtpretry_connections_open          connections that are open, by server
    smtpretry_connections_in_use        connections that a send is using, or opening, by server
    smtpretry_waiting                   sends that wait, for a connection or for their next try, by server
    smtpretry_pause_seconds             for how long the server is still left alone, by server
    smtpretry_pace                      messages a second at most, by server, where there is a limit
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from opentelemetry.metrics import MeterProvider
    from opentelemetry.trace import TracerProvider
    from prometheus_client import CollectorRegistry

    from smtpretry.events import Hook

__all__ = ["opentelemetry", "prometheus", "structlog"]


def prometheus(registry: CollectorRegistry | None = None) -> Hook:
    """Metrics for Prometheus, through prometheus_client.

    In its multiprocess mode (gunicorn with several workers) there are all but the last five, the gauges: each process
    knows its own clients alone.

    Args:
        registry: where to register them; None for the default one. Called again for the same registry, it returns the
            same hook: several clients share their metrics, and `server` tells them apart.

    Raises:
        ImportError: prometheus_client is not installed.
    """
    from ._prometheus import hook_for  # noqa: PLC0415 - an extra

    return hook_for(registry)


def opentelemetry(tracer_provider: TracerProvider | None = None, meter_provider: MeterProvider | None = None) -> Hook:
    """A span for each send, with an event for each attempt and each reply, and the metrics.

    The span begins with the first try, ends with the last recipient's end, and belongs to the span that is current
    where the message is sent. Its attributes are those of the semantic conventions for messaging, where they have one.

    Args:
        tracer_provider: for the spans; None for the global one.
        meter_provider: for the metrics; None for the global one.

    Raises:
        ImportError: opentelemetry-api is not installed.
    """
    from ._opentelemetry import hook_for  # noqa: PLC0415 - an extra

    return hook_for(tracer_provider, meter_provider)


def structlog(logger: object = None) -> Hook:
    """An entry for each event, with its fields: what the log of the standard library has, and more.

    To have it in one log only: ``logging.getLogger("smtpretry").disabled = True``.

    Args:
        logger: a structlog logger; None for ``structlog.get_logger("smtpretry")``.

    Raises:
        ImportError: structlog is not installed.
    """
    from ._structlog import StructlogHook  # noqa: PLC0415 - an extra

    return StructlogHook(logger)
