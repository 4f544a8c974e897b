"""An engine that dies while its worker is idle: the worker refuses with the cause, flushes, and exits."""

from __future__ import annotations

import json
import os
import re
import signal
import time

import pytest
import requests

import local
from local import Rules
from tests.helpers import wait_until
from tests.serving.engine_server import echo_worker
from tests.shared.http.servers import running
from tests.shared.test_telemetry import attributes, receiving

pytestmark = pytest.mark.engine


def kill_engine(log: str) -> None:
    os.kill(int(re.findall(r"engine: process (\d+)", log)[-1]), signal.SIGKILL)


def test_over_http_the_health_check_fails_first() -> None:
    with receiving() as receiver:
        endpoint = f"http://127.0.0.1:{receiver.server_port}"
        with running(module=echo_worker.__name__, OTEL_EXPORTER_OTLP_ENDPOINT=endpoint) as server:
            assert server.work(text="hi").json()["output"] == {"text": "hi"}
            kill_engine("".join(server.log))
            killed = time.monotonic()
            wait_until(lambda: server.ping() == 503, 10)
            refused = server.work(text="hi")
            assert refused.status_code == 503
            assert refused.headers["retry-after"]
            error = json.loads(refused.json()["error"])
            assert error["code"] == "engine_died"
            assert "it ended with status -9" in error["message"]
            assert server.end() == 1
            assert time.monotonic() - killed < 15
    assert [(span.name, attributes(span)["status"]) for span in receiver.spans][:1] == [("/runsync", 200)]


def test_in_queue_mode_the_worker_is_replaced() -> None:
    with receiving() as receiver:
        env = {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{receiver.server_port}"}
        with local.running(str(echo_worker.__file__), env=env, rules=Rules(restart_delay=0.1)) as platform:
            url, key = f"{platform.endpoint_url}/runsync", {"Authorization": "any"}

            def ask() -> None:
                answer = requests.post(url, json={"input": {"text": "hi"}}, headers=key, timeout=120).json()
                assert answer["output"] == {"text": "hi"}, answer

            ask()
            (before,) = platform.workers
            kill_engine("\n".join(before.lines))
            wait_until(lambda: before.returncode == 1)
            assert [span.name for span in receiver.spans] == ["native"]
            ask()
