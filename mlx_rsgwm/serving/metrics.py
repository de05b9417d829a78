"""What a server says of itself to Prometheus."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from mlx_rsgwm.serving.engine import Counts, Engine

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class EngineCollector:
    """The engine's counts and load, as they are when they are asked for."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Any]:
        """One metric each."""
        for each in fields(Counts):
            name = f"rsgwm_engine_{each.name}"
            yield CounterMetricFamily(
                name, f"Engine: {each.name.replace('_', ' ')}.", getattr(self._engine.counts, each.name)
            )
        for name, value in self._engine.load().items():
            what = "rows under way" if name == "rows" else f"requests {name}"
            yield GaugeMetricFamily(f"rsgwm_{name}", f"Engine: {what}.", value)
        if self._engine.ready:
            adapters = sum(self._engine.library.slots.nbytes().values())
            yield GaugeMetricFamily("rsgwm_models", "Models that are served.", len(self._engine.library.models()))
            yield GaugeMetricFamily("rsgwm_adapter_bytes", "Bytes of the adapters that are loaded.", adapters)


class Metrics:
    """Counters of requests; a registry of its own, so that several servers can be in one process."""

    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(EngineCollector(engine))
        labels = ("path", "status")
        self.requests = Counter("rsgwm_requests", "Requests by endpoint and status.", labels, registry=self.registry)
        self.first = Histogram(
            "rsgwm_first_token_seconds", "Until the first text.", buckets=SECONDS, registry=self.registry
        )
        self.answer = Histogram("rsgwm_answer_seconds", "Until the last.", buckets=SECONDS, registry=self.registry)

    def text(self) -> bytes:
        """The page that Prometheus reads."""
        return generate_latest(self.registry)
