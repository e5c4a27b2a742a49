"""The metrics for Prometheus. Needs the extra ``prometheus``."""

from __future__ import annotations

from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

try:
    from prometheus_client import REGISTRY, CollectorRegistry, Counter, Histogram
    from prometheus_client.core import GaugeMetricFamily
except ImportError as error:
    _message = "this hook needs prometheus_client: install smtpretry with its extra 'prometheus'"
    raise ImportError(_message, name=error.name) from error

from ._metrics import ACCEPTANCE, BUCKETS, COUNTERS, GAUGES, Clients, acceptance, counts, gauges

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from smtpretry.delivery import Delivery
    from smtpretry.events import Event
    from smtpretry.stats import Stats

_hooks: WeakKeyDictionary[CollectorRegistry, PrometheusHook] = WeakKeyDictionary()


def hook_for(registry: CollectorRegistry | None) -> PrometheusHook:
    """The hook of a registry, in which a metric can be registered but once."""
    registry = REGISTRY if registry is None else registry
    if registry not in _hooks:
        _hooks[registry] = PrometheusHook(registry)
    return _hooks[registry]


class PrometheusHook:
    """Counts what it is told; asks the clients for the rest when it is scraped, from whatever thread."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._counters = {
            name: Counter(f"smtpretry_{name}", about, labels, registry=registry)
            for name, (about, labels) in COUNTERS.items()
        }
        self._acceptance = Histogram(
            "smtpretry_acceptance_seconds", ACCEPTANCE, ["server"], registry=registry, buckets=BUCKETS
        )
        self._gauges = _Gauges()
        registry.register(self._gauges)

    def __call__(self, delivery: Delivery | None, event: Event) -> None:
        """Count it."""
        for name, labels in counts(delivery, event):
            counter = self._counters[name]
            (counter.labels(*labels) if labels else counter).inc()
        if (taken := acceptance(event)) is not None:
            self._acceptance.labels(taken.server).observe(taken.elapsed)

    def watch(self, stats: Callable[[], Stats]) -> None:
        """Show a client's stats, too."""
        self._gauges.clients.watch(stats)


class _Gauges:
    """A collector: what the clients say when they are asked."""

    def __init__(self) -> None:
        self.clients = Clients()

    def describe(self) -> Iterator[GaugeMetricFamily]:
        """Their names, without asking anybody."""
        for name, (about, _) in GAUGES.items():
            yield GaugeMetricFamily(f"smtpretry_{name}", about, labels=["server"])

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Their values now."""
        clients = list(self.clients)
        for family, name in zip(self.describe(), GAUGES, strict=True):
            for server, value in gauges(name, clients).items():
                family.add_metric([server], value)
            yield family
