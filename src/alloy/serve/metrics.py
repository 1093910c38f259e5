"""Prometheus metrics with vLLM's names (serving.md section 9), and one line of status while there is work."""

from collections.abc import Iterator, Sequence
from time import perf_counter
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from alloy.engine.request import Timings
from alloy.serve.driver import Ticket
from alloy.serve.protocol import Json

if TYPE_CHECKING:
    from alloy.engine.engine import Gauges

_FAST = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_SIZES = tuple(2**i for i in range(0, 21))
HISTOGRAMS = {
    "time_to_first_token_seconds": ("Arrival to first token.", _FAST),
    "inter_token_latency_seconds": ("Between two tokens of one answer.", _FAST),
    "e2e_request_latency_seconds": ("Arrival to last token.", _FAST),
    "request_queue_time_seconds": ("Arrival to first computation.", _FAST),
    "request_prefill_time_seconds": ("First computation to first token.", _FAST),
    "request_decode_time_seconds": ("First to last token.", _FAST),
    "request_prompt_tokens": ("Prompt tokens of a request.", _SIZES),
    "request_generation_tokens": ("Tokens generated for a request.", _SIZES),
    "iteration_tokens_total": ("Tokens computed in one step.", _SIZES),
}


class Metrics(Collector):
    """Counters of the server; what the engine counts is read from its latest report.

    Args:
        prefix: "alloy" or "vllm"
        model: the label of every series
    """

    def __init__(self, prefix: str, model: str) -> None:
        self._prefix = prefix
        self._model = model
        # what a scrape reads
        registry = self.registry = CollectorRegistry()
        self._gauges: Gauges | None = None
        self._stats: Any = None
        self._tokens_seen = 0
        self._status: tuple[float, int, int] = (perf_counter(), 0, 0)
        self._reasoning = self._counter("reasoning_tokens", "Tokens inside thoughts.")
        self._success = self._counter("request_success", "Requests answered.", "finished_reason")
        self._rejected = self._counter("request_rejected", "Requests refused.", "code")
        self._errors = self._counter("request_error", "Requests that the model could not finish.")
        self._histograms = {
            name: Histogram(f"{prefix}:{name}", text, ["model_name"], registry=registry, buckets=buckets).labels(model)
            for name, (text, buckets) in HISTOGRAMS.items()
        }
        registry.register(self)

    def stepped(self, gauges: "Gauges", stats: Any, gaps: Sequence[float]) -> None:
        """Take the engine's report of one round."""
        self._gauges, self._stats = gauges, stats
        for gap in gaps:
            self._histograms["inter_token_latency_seconds"].observe(gap)
        seen = stats.prompt_tokens - stats.cached_tokens + stats.generated_tokens
        new, self._tokens_seen = seen - self._tokens_seen, seen
        if new > 0:
            self._histograms["iteration_tokens_total"].observe(new)

    def answered(self, ticket: Ticket, reasons: Sequence[str], usage: Json, timings: Timings) -> None:
        """Note a ticket whose answers are complete; `timings` of its last completion."""
        for reason in reasons:
            self._success.labels(self._model, reason).inc()
        self._reasoning.labels(self._model).inc(usage["completion_tokens_details"]["reasoning_tokens"])
        self._histograms["request_prompt_tokens"].observe(ticket.prompt_tokens)
        self._histograms["request_generation_tokens"].observe(usage["completion_tokens"])
        if ticket.first_output is not None and ticket.last_output is not None:
            self._histograms["time_to_first_token_seconds"].observe(ticket.first_output - ticket.arrival)
            self._histograms["e2e_request_latency_seconds"].observe(ticket.last_output - ticket.arrival)
        if timings.started_s is not None and timings.first_token_s is not None and timings.finished_s is not None:
            self._histograms["request_queue_time_seconds"].observe(timings.started_s)
            self._histograms["request_prefill_time_seconds"].observe(timings.first_token_s - timings.started_s)
            self._histograms["request_decode_time_seconds"].observe(timings.finished_s - timings.first_token_s)

    def refused(self, code: str) -> None:
        """Count a refusal."""
        self._rejected.labels(self._model, code).inc()

    def failed(self) -> None:
        """Count a request with scores that are not numbers."""
        self._errors.labels(self._model).inc()

    def status_line(self) -> str | None:
        """One line about the time since the last call; None when nothing runs."""
        gauges, stats = self._gauges, self._stats
        if gauges is None or not (gauges.running or gauges.waiting):
            return None
        then, prompt, generated = self._status
        now = perf_counter()
        self._status = (now, stats.prompt_tokens, stats.generated_tokens)
        seconds = max(now - then, 1e-9)
        hits = stats.cached_tokens / max(1, stats.prompt_tokens)
        drafted, accepted = sum(stats.drafted_at), sum(stats.accepted_at)
        accept = f", drafts kept {accepted / drafted:.0%}" if drafted else ""
        return (
            f"running {gauges.running}, waiting {gauges.waiting}, prompt {(stats.prompt_tokens - prompt) / seconds:,.0f} tok/s, "
            f"answers {(stats.generated_tokens - generated) / seconds:,.0f} tok/s, "
            f"KV {_used(gauges.blocks, gauges.blocks_free):.0%}, slots {_used(gauges.slots, gauges.slots_free):.0%}, "
            f"prefix hits {hits:.0%}{accept}"
        )

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        """The engine's own numbers, for the registry."""
        gauges, stats = self._gauges, self._stats
        if gauges is None:
            return
        values = {
            "num_requests_running": (gauges.running, "Sequences that run."),
            "num_requests_waiting": (gauges.waiting, "Sequences that wait."),
            "kv_cache_usage_perc": (_used(gauges.blocks, gauges.blocks_free), "Share of KV blocks in use."),
            "state_slot_usage_perc": (_used(gauges.slots, gauges.slots_free), "Share of state slots in use."),
            "state_snapshots": (gauges.slots_cached, "States kept for prefixes."),
        }
        for pool in ("blocks", "slots"):
            values[f"{pool}_total"] = (getattr(gauges, pool), f"All {pool}.")
            for part in ("free", "cached"):
                values[f"{pool}_{part}"] = (getattr(gauges, f"{pool}_{part}"), f"{pool} {part}".capitalize() + ".")
        counts = {
            "prefix_cache_queries": (stats.prompt_tokens, "Prompt tokens looked up."),
            "prefix_cache_hits": (stats.cached_tokens, "Prompt tokens found."),
            "prompt_tokens": (stats.prompt_tokens, "Prompt tokens of requests that began."),
            "generation_tokens": (stats.generated_tokens, "Tokens generated."),
            "num_preemptions": (stats.preemptions, "Sequences put back."),
            "spec_decode_num_draft_tokens": (sum(stats.drafted_at), "Tokens drafted."),
            "spec_decode_num_accepted_tokens": (sum(stats.accepted_at), "Drafted tokens kept."),
        }
        for kind, rows in ((GaugeMetricFamily, values), (CounterMetricFamily, counts)):
            for name, (value, text) in rows.items():
                family = kind(f"{self._prefix}:{name}", text, labels=["model_name"])
                family.add_metric([self._model], value)
                yield family

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"{self._prefix}:{name}", text, ["model_name", *labels], registry=self.registry)


def _used(total: int, free: int) -> float:
    return 1 - free / total if total else 0.0
