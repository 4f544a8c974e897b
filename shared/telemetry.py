"""What one job cost, by stage: measured once, and given to the log, to Prometheus and to OpenTelemetry.

    with telemetry.record("/v1/embeddings", "http") as record:
        ...                                  # the code of a worker calls telemetry.observe("model", seconds)
    # queue mode: one JSON log line; HTTP mode: /metrics. With OTEL_EXPORTER_OTLP_ENDPOINT, a span in both.

Stages, in seconds: `queue` (waiting for a slot), `preprocess`, `batch_wait` (waiting for a batch), `model`,
`first_token`, `total`. Counts: `batch_size`, `prompt_tokens`, `completion_tokens`, `audio_seconds`.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal

from shared.logs import log

Mode = Literal["queue", "http"]
FLUSH_S = 5.0  # what the last export may take: a container has 10 s from SIGTERM to SIGKILL


@dataclass(slots=True)
class Record:
    """The measurements of one job. status: of HTTP, in queue mode what it would be."""

    route: str
    mode: Mode
    begin: float = field(default_factory=time.perf_counter)
    wall: float = field(default_factory=time.time)  # s since 1970
    status: int = 200
    values: dict[str, float] = field(default_factory=dict)

    def observe(self, name: str, value: float) -> None:
        """Add a stage's seconds or a count; of several batches the largest size counts."""
        before = self.values.get(name, 0.0)
        self.values[name] = max(before, value) if name == "batch_size" else before + value

    def observe_answer(self, answer: Any) -> None:
        """The counts that an answer states itself: `usage` of tokens, or of seconds of audio."""
        usage = _get(answer, "usage")
        for name in ("prompt_tokens", "completion_tokens"):
            if isinstance(value := _get(usage, name), int):
                self.observe(name, value)
        seconds = _get(usage, "seconds") or _get(answer, "duration")
        if isinstance(seconds, int | float):
            self.observe("audio_seconds", seconds)

    def first_token(self) -> None:
        """The first part of a streamed answer goes out now."""
        self.values.setdefault("first_token", time.perf_counter() - self.begin)


_current: ContextVar[Record | None] = ContextVar("record", default=None)
_sinks: dict[Mode, list[Callable[[Record], None]]] = {"queue": [], "http": []}
phases: dict[str, float] = {}
"""The seconds of each phase of the start; `shared.startup` fills it."""


def observe(name: str, value: float) -> None:
    """Add `value` to the measurement `name` of the job that the running task serves; without one, nothing."""
    if job := _current.get():
        job.observe(name, value)


def _get(source: Any, name: str) -> Any:
    return source.get(name) if isinstance(source, dict) else getattr(source, name, None)


def add_sink(mode: Mode, sink: Callable[[Record], None]) -> None:
    """Call `sink` with the record of each job of this mode that ends from now on.

    The requests that a worker sends itself at its start are jobs of queue mode: they reach no sink, as queue
    mode's are added after the start.
    """
    _sinks[mode].append(sink)


@contextmanager
def record(route: str, mode: Mode) -> Iterator[Record]:
    """Measure a job from here to the end of the block."""
    job = Record(route, mode)
    token = _current.set(job)
    try:
        yield job
    finally:
        with suppress(ValueError):  # a generator that another task closes
            _current.reset(token)
        job.values["total"] = time.perf_counter() - job.begin
        for sink in _sinks[mode]:
            sink(job)


def log_line(job: Record) -> None:
    """Log one JSON object: route, status and the measurements, rounded to 0.1 ms."""
    values = {name: round(value, 4) for name, value in job.values.items()}
    log.info("%s", json.dumps({"event": "job", "route": job.route, "status": job.status, **values}))


# ---- Prometheus -----------------------------------------------------------------------------------------

_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Prometheus:
    """The metrics of HTTP mode. in_flight, waiting: read when the metrics are."""

    def __init__(self, *, in_flight: Callable[[], float], waiting: Callable[[], float]) -> None:
        from prometheus_client import (
            CollectorRegistry,
            Counter,
            Gauge,
            Histogram,
            disable_created_metrics,
            generate_latest,
        )

        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry, self._generate = CollectorRegistry(), generate_latest

        def seconds(name: str, text: str) -> Histogram:
            return Histogram(
                f"worker_{name}_seconds", text, ["route"], buckets=_BUCKETS, registry=self._registry
            )

        self._requests = Counter(
            "worker_requests", "Requests that ended", ["route", "status"], registry=self._registry
        )
        self._stages = {
            "queue": seconds("queue", "Time from arrival to a slot"),
            "preprocess": seconds("preprocess", "Decoding and tokenizing"),
            "batch_wait": seconds("batch_wait", "Time in the queue of the batcher"),
            "model": seconds("model", "Time in batches of the model"),
            "first_token": seconds("time_to_first_token", "Time from arrival to the first streamed part"),
            "total": seconds("request", "Time from arrival to the end"),
        }
        self._batch_size = Histogram(
            "worker_batch_size",
            "Items in a batch of the model",
            buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512),
            registry=self._registry,
        )
        self._tokens = Counter("worker_tokens", "Tokens", ["kind"], registry=self._registry)
        self._audio = Counter("worker_audio_seconds", "Seconds of audio", registry=self._registry)
        self._load = Gauge("worker_load_seconds", "Phases of the start", ["phase"], registry=self._registry)
        running = Gauge("worker_requests_in_flight", "Requests that run", registry=self._registry)
        running.set_function(in_flight)
        queued = Gauge("worker_requests_waiting", "Requests that wait", registry=self._registry)
        queued.set_function(waiting)

    def __call__(self, job: Record) -> None:
        self._requests.labels(job.route, str(job.status)).inc()
        for name, value in job.values.items():
            if name in self._stages:
                self._stages[name].labels(job.route).observe(value)
            elif name.endswith("_tokens"):
                self._tokens.labels(name.removesuffix("_tokens")).inc(value)
            elif name == "audio_seconds":
                self._audio.inc(value)
            elif name == "batch_size":
                self._batch_size.observe(value)

    def exposition(self) -> bytes:
        """Every metric in Prometheus' text format."""
        for name, seconds in dict(phases).items():
            self._load.labels(name).set(seconds)
        return self._generate(self._registry)


# ---- OpenTelemetry --------------------------------------------------------------------------------------


def start_otlp(worker: str, mode: Mode) -> Callable[[], None]:
    """Export a span and metrics of each job by OTLP over HTTP, as OTEL_* says; returns what flushes them.

    Nothing is imported and nothing happens where OTEL_EXPORTER_OTLP_ENDPOINT is unset. A thread imports what
    is needed; an endpoint that does not answer delays neither the start nor a job.
    """
    if not os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT"):
        return lambda: None
    shutdowns: list[Callable[[], object]] = []

    def start() -> None:
        try:
            shutdowns.extend(_export(worker, mode))
        except Exception as error:
            log.warning("OpenTelemetry is off: %s", error)

    starting = threading.Thread(target=start, name="otlp", daemon=True)
    starting.start()

    def flush() -> None:
        deadline = time.monotonic() + FLUSH_S
        starting.join(FLUSH_S)
        ending = [threading.Thread(target=shutdown, daemon=True) for shutdown in shutdowns]
        for thread in ending:
            thread.start()
        for thread in ending:
            thread.join(max(0.0, deadline - time.monotonic()))

    return flush


def _export(worker: str, mode: Mode) -> list[Callable[[], object]]:
    """Send each job's record to the exporters; returns what ends them."""
    from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.trace import Status, StatusCode

    resource = Resource.create({"service.name": os.environ.get("OTEL_SERVICE_NAME", f"worker-{worker}")})
    # Not at exit by themselves: that waits for as long as the endpoint does not answer.
    traces = TracerProvider(resource=resource, shutdown_on_exit=False)
    traces.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    reader = PeriodicExportingMetricReader(OTLPMetricExporter())
    meters = MeterProvider(resource=resource, metric_readers=[reader], shutdown_on_exit=False)
    tracer, meter = traces.get_tracer("worker"), meters.get_meter("worker")
    seconds = meter.create_histogram("worker.stage.duration", "s")
    counts = meter.create_counter("worker.count")
    sizes = meter.create_histogram("worker.batch.size", "{item}")

    def export(job: Record) -> None:
        begin = int(job.wall * 1e9)
        attributes: dict[str, Any] = {"route": job.route, "mode": job.mode, "status": job.status}
        span = tracer.start_span(job.route, start_time=begin, attributes=attributes | job.values)
        if job.status >= 500:
            span.set_status(Status(StatusCode.ERROR))
        span.end(begin + int(job.values["total"] * 1e9))
        for name, value in job.values.items():
            if name.endswith("_tokens") or name == "audio_seconds":
                counts.add(value, attributes | {"kind": name})
            elif name == "batch_size":
                sizes.record(value, attributes)
            else:
                seconds.record(value, attributes | {"stage": name})

    add_sink(mode, export)
    return [traces.shutdown, meters.shutdown]
