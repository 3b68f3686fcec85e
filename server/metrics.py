"""Prometheus metrics on a registry of their own: vLLM's names, so that its dashboards work, and `fathom_*`."""

import time
from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from engine.client import EngineClient
from server.admission import Admission

# A time stamp beside every counter would double the page; no dashboard reads them.
disable_created_metrics()  # type: ignore[no-untyped-call]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_TTFT = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0),
    *(2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_ITL = (
    *(0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.025, 0.035, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5),
    *(0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
_LATENCY = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
_TOKENS = tuple(float(m * 10**e) for e in range(7) for m in (1, 2, 5))
_LABELS = ("model_name", "engine")
_FINISH_REASONS = ("stop", "length", "tool_calls", "abort", "error")

_HISTOGRAMS = {
    "vllm:time_to_first_token_seconds": ("Seconds from arrival to the first token.", _TTFT),
    "vllm:inter_token_latency_seconds": ("Seconds between tokens of one request.", _ITL),
    "vllm:request_time_per_output_token_seconds": ("Mean seconds for each token after the first.", _ITL),
    "vllm:e2e_request_latency_seconds": ("Seconds from arrival to the end.", _LATENCY),
    "vllm:request_queue_time_seconds": ("Seconds in the engine's queue.", _LATENCY),
    "vllm:request_prefill_time_seconds": ("Seconds from the first step to the first token.", _LATENCY),
    "vllm:request_decode_time_seconds": ("Seconds from the first token to the last.", _LATENCY),
    "vllm:request_inference_time_seconds": ("Seconds from the first step to the end.", _LATENCY),
    "vllm:request_prompt_tokens": ("Prompt tokens of a request.", _TOKENS),
    "vllm:request_generation_tokens": ("Generated tokens of a request.", _TOKENS),
    "vllm:request_params_max_tokens": ("max_tokens of a request.", _TOKENS),
}


class Metrics:
    """Everything `/metrics` shows. Labels never hold a client's text."""

    def __init__(self, model_name: str, engine: Callable[[], EngineClient | None], admission: Admission) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_EngineCollector(model_name, engine, admission))
        labels = (model_name, "0")
        self._histograms = {
            name: Histogram(name, text, _LABELS, buckets=buckets, registry=self.registry).labels(*labels)
            for name, (text, buckets) in _HISTOGRAMS.items()
        }
        success = Counter(
            "vllm:request_success", "Finished requests.", (*_LABELS, "finished_reason"), registry=self.registry
        )
        self._finished = {reason: success.labels(*labels, reason) for reason in _FINISH_REASONS}
        self._responses = Counter("fathom_http_responses", "HTTP answers.", ("route", "status"), registry=self.registry)
        self._rejections = Counter(
            "fathom_admission_rejections", "Requests refused for load.", ("code",), registry=self.registry
        )
        self.unknown_fields = Counter(
            "fathom_unknown_fields", "Request fields that were ignored as unknown.", registry=self.registry
        )

        lines = Counter("fathom_batch_lines", "Lines of batches answered.", ("outcome",), registry=self.registry)
        self.batch_lines = {outcome: lines.labels(outcome) for outcome in ("completed", "failed")}

    def observe(self, name: str, value: float) -> None:
        """Add to one of the `vllm:` histograms; `name` without the prefix."""
        self._histograms["vllm:" + name].observe(value)

    def count_finish(self, reason: str) -> None:
        self._finished[reason].inc()

    def count_response(self, route: str | None, status: int) -> None:
        """`route` is the pattern of a path, never a client's text; None when no route took the request."""
        self._responses.labels(route or "other", str(status)).inc()
        if status in (429, 503) and route is not None and not route.startswith("/health"):
            self._rejections.labels(str(status)).inc()

    def render(self) -> bytes:
        """Prometheus text format 0.0.4."""
        return generate_latest(self.registry)


class RequestMeter:
    """Times one request from its arrival; `finish` is idempotent, the first reason counts.

    One that is not `measured` counts, and its times do not: nobody waits for it.
    """

    def __init__(
        self, metrics: Metrics, prompt_tokens: int, max_tokens: int, arrival: float, *, measured: bool = True
    ) -> None:
        self._metrics = metrics
        self._measured = measured
        self._prompt_tokens = prompt_tokens
        self._arrival = arrival
        self._first = self._last = 0.0
        self._queued_seconds = 0.0
        self.num_tokens = 0
        self._open = True
        metrics.observe("request_params_max_tokens", max_tokens)

    def tokens(self, count: int, queued_seconds: float) -> None:
        """`count` new tokens are there."""
        if not self._measured:
            self.num_tokens += count
            return
        now = time.monotonic()
        if not self.num_tokens:
            self._first = now
            self._queued_seconds = queued_seconds
            self._metrics.observe("time_to_first_token_seconds", now - self._arrival)
        else:
            # Tokens of several steps may come at once: each of them took its part of the time.
            for _ in range(count):
                self._metrics.observe("inter_token_latency_seconds", (now - self._last) / count)
        self._last = now
        self.num_tokens += count

    def finish(self, reason: str) -> None:
        if not self._open:
            return
        self._open = False
        now = time.monotonic()
        metrics = self._metrics
        metrics.count_finish(reason)
        metrics.observe("request_prompt_tokens", self._prompt_tokens)
        metrics.observe("request_generation_tokens", self.num_tokens)
        if not self._measured:
            return
        metrics.observe("e2e_request_latency_seconds", now - self._arrival)
        if self.num_tokens:
            started = self._arrival + self._queued_seconds
            metrics.observe("request_queue_time_seconds", self._queued_seconds)
            metrics.observe("request_prefill_time_seconds", max(0.0, self._first - started))
            metrics.observe("request_decode_time_seconds", self._last - self._first)
            metrics.observe("request_inference_time_seconds", max(0.0, self._last - started))
        if self.num_tokens > 1:
            metrics.observe("request_time_per_output_token_seconds", (self._last - self._first) / (self.num_tokens - 1))


class _EngineCollector(Collector):
    """Reads the engine's newest statistics when it is scraped."""

    def __init__(self, model_name: str, engine: Callable[[], EngineClient | None], admission: Admission) -> None:
        self._labels = (model_name, "0")
        self._engine = engine
        self._admission = admission

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterator[Metric]:
        yield self._gauge("fathom_queued_requests", "Waiting for a first token.", self._admission.queued_requests)
        yield self._gauge("fathom_queued_tokens", "Prompt tokens of those.", self._admission.queued_tokens)
        yield self._gauge("fathom_requests_in_flight", "Requests being answered.", self._admission.in_flight)
        engine = self._engine()
        yield self._gauge("fathom_engine_up", "1 while the engine lives.", bool(engine and engine.dead_reason is None))
        if engine is None:
            return
        info, stats = engine.info, engine.stats
        used = 1 - stats.num_free_pages / info.num_pages if info.num_pages else 0.0
        yield self._gauge("vllm:num_requests_running", "Requests with a slot.", stats.num_running)
        yield self._gauge("vllm:num_requests_waiting", "Requests in the engine's queue.", stats.num_waiting)
        yield self._gauge("vllm:kv_cache_usage_perc", "Share of pages in use, 0 to 1.", used)
        yield self._counter("vllm:prompt_tokens", "Prompt tokens computed.", stats.prompt_tokens)
        yield self._counter("vllm:generation_tokens", "Tokens generated.", stats.generation_tokens)
        yield self._counter("vllm:num_preemptions", "Requests set aside for others.", stats.num_preemptions)
        cache = GaugeMetricFamily(
            "vllm:cache_config_info",
            "Geometry of the KV cache.",
            labels=("model_name", "engine", "block_size", "num_gpu_blocks", "cache_dtype", "enable_prefix_caching"),
        )
        geometry = (str(info.page_tokens), str(info.num_pages), info.kv_cache_dtype, str(info.enable_prefix_cache))
        cache.add_metric((*self._labels, *geometry), 1)
        yield cache
        yield self._gauge("fathom_pages_total", "Pages of the KV cache.", info.num_pages)
        yield self._gauge("fathom_pages_free", "Pages nobody holds.", stats.num_free_pages)
        yield self._gauge("fathom_slots_total", "Slots: requests that can run at once.", info.num_slots)
        yield self._gauge("fathom_slots_free", "Slots nobody holds.", stats.num_free_slots)
        yield self._gauge("fathom_engine_load_seconds", "Seconds the engine took to load.", info.load_seconds)
        yield self._gauge("fathom_engine_step_seconds", "Seconds of the newest step.", stats.step_seconds)
        yield self._gauge("fathom_engine_step_tokens", "Tokens of the newest step.", stats.step_tokens)
        yield self._counter("fathom_engine_steps", "Steps since the start.", stats.step_id)
        yield self._gauge("fathom_engine_predicted_step_seconds", "The same, predicted.", stats.predicted_step_seconds)
        yield self._counter(
            "fathom_mispredicted_steps",
            "Steps predicted more than 15 % off.",
            stats.num_mispredicted_steps,
        )
        yield self._gauge("fathom_running_long_requests", "Long ones of the running requests.", stats.num_running_long)
        yield self._gauge("fathom_waiting_long_requests", "Long ones of the waiting requests.", stats.num_waiting_long)
        yield self._gauge("fathom_waiting_tokens", "Tokens of the waiting requests.", stats.num_waiting_tokens)
        yield self._gauge("fathom_backlog_seconds", "Prompt work queued or begun, predicted.", stats.backlog_seconds)
        yield self._gauge("fathom_drain_seconds", "How long the backlog takes at today's pace.", stats.drain_seconds)
        yield self._counter("vllm:prefix_cache_queries", "Prompt tokens that were looked up.", stats.queried_tokens)
        yield self._counter("vllm:prefix_cache_hits", "Prompt tokens that were cached.", stats.hit_tokens)
        yield self._gauge("fathom_cached_pages", "Pages of the prefix cache on the device.", stats.num_cached_pages)
        yield self._gauge(
            "fathom_host_pages_used", "Pages of the prefix cache in host memory.", stats.num_host_pages_used
        )
        yield self._gauge("fathom_snapshots_used", "Slots saved in host memory.", stats.num_snapshots_used)
        yield self._counter("fathom_hibernations", "Requests set aside, their pages kept.", stats.num_hibernations)
        yield self._counter("fathom_wakes", "Requests that came back from one.", stats.num_wakes)
        yield self._gauge("fathom_hibernated_requests", "Requests set aside now.", stats.num_hibernated)
        yield self._counter(
            "fathom_recompute_preemptions", "Requests set aside and not kept.", stats.num_recompute_preemptions
        )
        yield self._counter("fathom_moved_bytes", "Copied between device and host.", stats.moved_bytes)
        misses = CounterMetricFamily(
            "fathom_prefix_misses", "Started requests by why no more was cached.", labels=(*_LABELS, "reason")
        )
        for reason, count in sorted(stats.miss_counts.items()):
            misses.add_metric((*self._labels, reason), count)
        yield misses
        yield self._gauge("fathom_parked_requests", "Waiting for a prefix that another computes.", stats.num_parked)
        yield self._counter("fathom_prefix_waits", "Waits for such a prefix.", stats.num_prefix_waits)
        yield self._gauge("fathom_grammars", "Requests whose answer follows a grammar.", stats.num_grammars)
        yield self._gauge("fathom_grammar_bytes", "Compiled grammars in the engine, about.", stats.grammar_bytes)
        yield self._counter("fathom_bypasses", "Starts past a request that did not fit.", stats.num_bypasses)
        yield self._counter(
            "fathom_recomputed_tokens", "Rows computed again after a preemption.", stats.num_recomputed_tokens
        )

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, text, labels=_LABELS)
        family.add_metric(self._labels, value)
        return family

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(name, text, labels=_LABELS)
        family.add_metric(self._labels, value)
        return family
