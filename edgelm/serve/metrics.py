"""What `/metrics` shows, in Prometheus' format, out of a registry of this server's own."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


@dataclass(frozen=True, slots=True)
class ModelState:
    """What a scrape asks of a model of the shelf."""

    name: str
    loaded: bool
    users: int
    """Requests that use it now."""
    waiting: int
    """Texts that wait to be decoded."""
    decoding: int
    """Texts that are decoded."""
    memory_bytes: int
    """Forecast; 0 where the model is not loaded."""


class Metrics:
    """Counters and histograms of one server."""

    def __init__(self, states: Callable[[], Iterable[ModelState]]) -> None:
        registry = self._registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        registry.register(_States(states))
        by_route, by_model = ["route", "status"], ["model"]
        self.requests = Counter("edgelm_requests", "Answered requests.", by_route, registry=registry)
        self.request_seconds = Histogram(
            "edgelm_request_seconds", "Time of a whole request.", ["route"], buckets=_SECONDS, registry=registry
        )
        self.prompt_tokens = Counter("edgelm_prompt_tokens", "Tokens of prompts.", by_model, registry=registry)
        self.reused_tokens = Counter(
            "edgelm_reused_prompt_tokens", "Tokens of prompts that the cache already held.", by_model, registry=registry
        )
        self.new_tokens = Counter("edgelm_generated_tokens", "Generated tokens.", by_model, registry=registry)
        self.drafted_tokens = Counter(
            "edgelm_drafted_tokens", "Tokens that small models drafted.", by_model, registry=registry
        )
        self.accepted_tokens = Counter(
            "edgelm_accepted_draft_tokens", "Drafted tokens that came true.", by_model, registry=registry
        )
        self.texts = Counter(
            "edgelm_texts", "Finished texts, by the reason of their end.", ["model", "reason"], registry=registry
        )
        self.first_token_seconds = Histogram(
            "edgelm_first_token_seconds",
            "Time from a prompt's arrival to its first text, waiting included.",
            by_model,
            buckets=_SECONDS,
            registry=registry,
        )
        self.token_seconds = Histogram(
            "edgelm_token_seconds",
            "Time between two pieces of a text, for each of its tokens.",
            by_model,
            buckets=_TOKEN_SECONDS,
            registry=registry,
        )

    def page(self) -> bytes:
        """The text of `/metrics`."""
        return generate_latest(self._registry)


class _States(Collector):
    """Gauges that are read when somebody asks."""

    def __init__(self, states: Callable[[], Iterable[ModelState]]) -> None:
        self._states = states

    def collect(self) -> Iterator[Metric]:
        gauges = {
            "loaded": "Whether the model is loaded.",
            "users": "Requests that use the model now.",
            "waiting": "Texts that wait to be decoded.",
            "decoding": "Texts that are decoded side by side.",
            "memory_bytes": "Memory that the loaded model is forecast to take.",
        }
        families = {n: GaugeMetricFamily(f"edgelm_model_{n}", words, labels=["model"]) for n, words in gauges.items()}
        for state in self._states():
            for name, family in families.items():
                family.add_metric([state.name], float(getattr(state, name)))
        yield from families.values()
