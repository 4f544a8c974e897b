"""What a job cost: in the log, in Prometheus' format and by OTLP."""

from __future__ import annotations

import asyncio
import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from prometheus_client.parser import text_string_to_metric_families

from shared import telemetry
from shared.telemetry import Prometheus, Record
from tests.helpers import send, stream
from tests.shared.http.servers import running
from tests.shared.http.toy import make_handler

# ---- records ----------------------------------------------------------------------------------------------


@pytest.fixture
def records() -> list[Record]:
    """The records of the jobs in queue mode that end during the test."""
    made: list[Record] = []
    telemetry.add_sink("queue", made.append)
    return made


async def test_a_job_of_the_queue_is_measured(records: list[Record]) -> None:
    handler = make_handler()
    await send(handler, seconds=0.02)
    await send(handler, openai_route="/v1/chat/completions", openai_input={"messages": []})
    native, chat = records
    assert (native.route, native.mode, native.status) == ("native", "queue", 200)
    assert 0.02 <= native.values["model"] <= native.values["total"] < 0.5
    assert chat.route == "/v1/chat/completions"
    assert (chat.values["prompt_tokens"], chat.values["completion_tokens"]) == (2, 3)


async def test_a_streamed_job_has_the_time_of_its_first_part(records: list[Record]) -> None:
    await stream(make_handler(), stream=True, seconds=0.02)
    values = records[0].values
    assert 0 < values["first_token"] < 0.02
    assert values["total"] > 0.06


@pytest.mark.parametrize(
    ("fault", "status"), [("invalid", 400), ("crash", 500), ("dead", 503), ("memory", 500)]
)
async def test_a_failed_job_has_an_http_status(records: list[Record], fault: str, status: int) -> None:
    await send(make_handler(), fail=fault)
    await stream(make_handler(), stream=True, fail=fault)
    await send(make_handler(), openai_route="/v1/made-up", openai_input={})
    assert [record.status for record in records] == [status, status, 404]
    assert records[2].route == "native"  # what clients invent is no route


async def test_jobs_at_once_are_measured_apart(records: list[Record]) -> None:
    await asyncio.gather(*(send(make_handler(), seconds=number / 50) for number in range(1, 4)))
    assert [round(record.values["model"] * 50) for record in records] == [1, 2, 3]


async def test_a_generator_that_another_task_closes_is_measured(records: list[Record]) -> None:
    parts: Any = make_handler().stream({"id": "j", "input": {"stream": True, "parts": 9}})
    await asyncio.create_task(anext(parts))
    await asyncio.create_task(parts.aclose())
    assert len(records) == 1


def test_without_a_job_nothing_is_measured() -> None:
    telemetry.observe("model", 1.0)


def test_seconds_add_up_and_the_largest_batch_counts() -> None:
    record = Record("native", "queue")
    for name, value in (("model", 1.0), ("model", 0.5), ("batch_size", 8), ("batch_size", 3)):
        record.observe(name, value)
    assert record.values == {"model": 1.5, "batch_size": 8}


def test_counts_are_read_from_answers() -> None:
    record = Record("native", "queue")
    for answer in ({"usage": {"prompt_tokens": 3, "completion_tokens": None}}, {"duration": 2.5},
                   {"usage": {"seconds": 4}}, {"usage": None}, "text", [1], None):  # fmt: skip
        record.observe_answer(answer)
    assert record.values == {"prompt_tokens": 3, "audio_seconds": 6.5}


def test_the_log_line_is_one_json_object(capsys: pytest.CaptureFixture[str]) -> None:
    telemetry.log_line(Record("native", "queue", status=400, values={"total": 0.123456}))
    line = capsys.readouterr().out.partition("| ")[2]
    assert json.loads(line) == {"event": "job", "route": "native", "status": 400, "total": 0.1235}


# ---- Prometheus -------------------------------------------------------------------------------------------


def samples(text: str) -> dict[tuple[str, ...], float]:
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_prometheus_counts_by_route_and_status() -> None:
    metrics = Prometheus(in_flight=lambda: 3, waiting=lambda: 2)
    values = {
        "queue": 0.1,
        "model": 0.2,
        "total": 0.3,
        "batch_size": 4,
        "prompt_tokens": 5,
        "audio_seconds": 6,
    }
    metrics(Record("/v1/a", "http", values=values))
    metrics(Record("/v1/a", "http", status=429, values={"total": 0.0}))
    telemetry.phases["load"] = 1.5
    read = samples(metrics.exposition().decode())
    assert read["worker_requests_total", "/v1/a", "200"] == 1
    assert read["worker_requests_total", "/v1/a", "429"] == 1
    assert read["worker_model_seconds_sum", "/v1/a"] == 0.2
    assert read["worker_request_seconds_count", "/v1/a"] == 2
    assert read["worker_batch_size_sum",] == 4
    assert read["worker_tokens_total", "prompt"] == 5
    assert read["worker_audio_seconds_total",] == 6
    assert (read["worker_requests_in_flight",], read["worker_requests_waiting",]) == (3, 2)
    assert read["worker_load_seconds", "load"] == 1.5


@pytest.mark.engine
def test_metrics_of_a_worker_leave_out_its_own_requests() -> None:
    with running() as server:
        server.work(text="hi", seconds=0.1)
        read = samples(httpx.get(f"{server.url}/metrics").text)
        assert read["worker_requests_total", "/runsync", "200"] == 1
        assert not [key for key in read if key[0] == "worker_requests_total" and "native" in key]
        assert read["worker_model_seconds_sum", "/runsync"] > 0.09
        assert read["worker_load_seconds", "ready"] > 0


# ---- OpenTelemetry ----------------------------------------------------------------------------------------


class Receiver(ThreadingHTTPServer):
    """An OTLP endpoint. answers: False: it takes requests and never answers."""

    daemon_threads = True

    def __init__(self, *, answers: bool) -> None:
        self.spans: list[Any] = []
        self.metrics: dict[str, Any] = {}
        self.resources: set[str] = set()
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                if not answers:
                    time.sleep(60)
                receiver.take(self.path, body)
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)

    def take(self, path: str, body: bytes) -> None:
        if path == "/v1/traces":
            for group in ExportTraceServiceRequest.FromString(body).resource_spans:
                self.resources |= {attribute.value.string_value for attribute in group.resource.attributes}
                self.spans += [span for scope in group.scope_spans for span in scope.spans]
        else:
            for measured in ExportMetricsServiceRequest.FromString(body).resource_metrics:
                for scope in measured.scope_metrics:
                    self.metrics |= {metric.name: metric for metric in scope.metrics}


@contextmanager
def receiving(*, answers: bool = True) -> Iterator[Receiver]:
    with Receiver(answers=answers) as receiver:
        threading.Thread(target=receiver.serve_forever, daemon=True).start()
        yield receiver
        receiver.shutdown()


def attributes(span: Any) -> dict[str, Any]:
    return {a.key: getattr(a.value, a.value.WhichOneof("value")) for a in span.attributes}


@pytest.mark.engine
def test_spans_and_metrics_arrive_at_an_otlp_endpoint_by_the_end() -> None:
    with receiving() as receiver:
        endpoint = f"http://127.0.0.1:{receiver.server_port}"
        with running(OTEL_EXPORTER_OTLP_ENDPOINT=endpoint) as server:
            server.work(text="hi", seconds=0.1)
            server.work(fail="crash")
            server.process.terminate()
            assert server.end() == 0
    assert "worker-toy" in receiver.resources
    well, failed = sorted(receiver.spans, key=lambda span: attributes(span)["status"])
    assert (well.name, attributes(well)["mode"]) == ("/runsync", "http")
    assert attributes(well)["model"] > 0.09
    assert 0.09e9 < well.end_time_unix_nano - well.start_time_unix_nano < 5e9
    assert abs(well.start_time_unix_nano / 1e9 - time.time()) < 60
    assert (attributes(failed)["status"], failed.status.code) == (500, 2)
    points = receiver.metrics["worker.stage.duration"].histogram.data_points
    assert {"queue", "model", "total"} <= {attributes(point)["stage"] for point in points}


@pytest.mark.engine
def test_an_otlp_endpoint_that_does_not_answer_delays_neither_start_nor_requests_nor_end() -> None:
    with receiving(answers=False) as receiver:
        endpoint = f"http://127.0.0.1:{receiver.server_port}"
        with running(OTEL_EXPORTER_OTLP_ENDPOINT=endpoint, OTEL_BSP_SCHEDULE_DELAY="100") as server:
            times = []
            for _ in range(20):
                begin = time.monotonic()
                assert server.work(text="hi").status_code == 200
                times.append(time.monotonic() - begin)
                time.sleep(0.02)
            assert sorted(times)[10] < 0.2
            begin = time.monotonic()
            server.process.terminate()
            assert server.end() == 0
            assert time.monotonic() - begin < telemetry.FLUSH_S + 3


@pytest.mark.engine
def test_a_job_of_the_queue_is_logged_and_exported() -> None:
    job = json.dumps({"input": {"text": "hi", "seconds": 0.1}})
    with receiving() as receiver:
        env = {
            "SERVE_MODE": "queue",
            "STREAMING": "false",
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{receiver.server_port}",
        }
        with running("--test_input", job, until_ping=None, **env) as server:
            assert server.end(60) == 0
    logged = [json.loads(line.partition("| ")[2]) for line in server.log if '"event": "job"' in line]
    assert len(logged) == 1  # the worker's own request at its start is no job
    assert (logged[0]["route"], logged[0]["status"]) == ("native", 200)
    assert 0.09 < logged[0]["model"] <= logged[0]["total"]
    assert [attributes(span)["mode"] for span in receiver.spans] == ["queue"]


def test_without_an_endpoint_opentelemetry_is_not_imported() -> None:
    assert "OTEL_EXPORTER_OTLP_ENDPOINT" not in os.environ
    flush = telemetry.start_otlp("toy", "queue")
    flush()
    assert not [thread for thread in threading.enumerate() if thread.name == "otlp"]
