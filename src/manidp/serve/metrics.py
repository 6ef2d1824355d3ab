"""What the server tells Prometheus; each server has a registry of its own."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from manidp.serve.batching import Ran

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2.5, 5, 10, 30)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
CONTENT_TYPE = CONTENT_TYPE_LATEST


class Metrics:
    """Counters, gauges and histograms; labels are routes, statuses and names of operating points, never a client's."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        own: dict[str, Any] = {"registry": self.registry, "namespace": "manidp"}
        self.latency = Histogram("request_seconds", "From a request's headers to its answer", ["route"],
                                 buckets=SECONDS, **own)  # fmt: skip
        self.requests = Counter("requests", "Requests answered", ["route", "status"], **own)
        self.refused = Counter(
            "refused", "Requests refused for load (429, 503) or their deadline (504)", ["status"], **own
        )
        self.connections = Counter("connections_refused", "Connections ended before a request was read or its answer",
                                   ["reason"], **own)  # fmt: skip
        self.images = Counter("images", "Images answered, by the operating point used", ["budget"], **own)
        self.macs = Counter("macs", "Multiply-adds computed, by operating point", ["budget"], **own)
        self.batch = Histogram("batch_images", "Images in a batch of the engine", buckets=SIZES, **own)
        self.engine = Histogram("batch_seconds", "Time of a batch in the engine", buckets=SECONDS, **own)
        self.lines = Counter("log_lines_lost", "Lines of the log that nobody read in time", **own)

    def watch(self, name: str, help_: str, value: Callable[[], float]) -> None:
        """A gauge that is read when it is asked for."""
        Gauge(name, help_, registry=self.registry, namespace="manidp").set_function(value)

    def watch_budgets(self, names: list[str], in_force: Callable[[], str]) -> None:
        """1 for the operating point in force, 0 for the others of the dial."""
        gauge = Gauge("budget_in_force", "1 for the operating point in force", ["budget"], registry=self.registry,
                      namespace="manidp")  # fmt: skip
        for name in names:
            gauge.labels(name).set_function(partial(lambda one: float(in_force() == one), name))

    def ran(self, batch: Ran) -> None:
        """One batch of the engine."""
        self.images.labels(batch.point).inc(batch.images)
        self.macs.labels(batch.point).inc(batch.macs)
        self.batch.observe(batch.images)
        self.engine.observe(batch.seconds)

    def answered(self, route: str, status: int, seconds: float) -> None:
        """One request."""
        self.requests.labels(route, str(status)).inc()
        if status in (429, 503, 504):
            self.refused.labels(str(status)).inc()
        else:
            self.latency.labels(route).observe(seconds)

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self.registry)
