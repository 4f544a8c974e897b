"""RunPod's public API, spoken by RunPod's own client, with the unmodified SDK in the worker."""

import http.server
import json
import threading
import time
from pathlib import Path

import aiohttp
import pytest
import requests
import runpod
from runpod import Endpoint

from local import Platform
from tests.helpers import wait_until
from tests.local.conftest import RULES, Client, workers_health

pytestmark = pytest.mark.engine


@pytest.fixture
def endpoint(echo: Client, monkeypatch: pytest.MonkeyPatch) -> Endpoint:
    monkeypatch.setattr(runpod, "endpoint_url_base", echo.platform.base_url)
    return Endpoint("local", api_key="any")


def test_the_official_client(endpoint: Endpoint) -> None:
    job = endpoint.run({"input": {"sleep": 3, "n": 1}})
    assert job.status() in ("IN_QUEUE", "IN_PROGRESS")
    assert job.output(timeout=60)["echo"] == {"sleep": 3, "n": 1}
    assert job.status() == "COMPLETED"
    assert endpoint.run_sync({"n": 2}, timeout=20)["echo"] == {"n": 2}
    assert endpoint.purge_queue() == {"removed": 0, "status": "completed"}
    health = endpoint.health()
    assert health["workers"] == workers_health(idle=1, ready=1)
    assert set(health["jobs"]) == {"completed", "failed", "inProgress", "inQueue", "retried"}


def test_the_fields_of_a_finished_job(echo: Client) -> None:
    job = echo.runsync(sleep=0.3)
    (worker,) = echo.platform.workers
    assert job["id"].startswith("sync-")
    assert job["workerId"] == job["output"]["worker"] == worker.id
    assert job["status"] == "COMPLETED"
    assert 300 <= job["executionTime"] < 10_000
    assert 0 <= job["delayTime"] < 10_000
    for method in ("GET", "POST"):
        assert echo(method, f"status/{job['id']}").json() == job


def test_a_client_without_a_key_is_turned_away(echo: Client) -> None:
    for method, path in (("GET", "health"), ("POST", "runsync"), ("POST", "openai/v1/embeddings")):
        answer = requests.request(method, f"{echo.platform.endpoint_url}/{path}", json={"input": {"a": 1}})
        assert answer.status_code == 401


async def test_the_key_can_be_waived() -> None:
    platform = Platform(require_key=False)
    await platform.start()
    async with aiohttp.ClientSession() as session, session.get(platform.endpoint_url + "/health") as answer:
        assert answer.status == 200
    await platform.stop()


def test_cancel_in_progress_reaches_the_handler(echo: Client, endpoint: Endpoint, notes: Path) -> None:
    job = endpoint.run({"sleep": 60})
    wait_until(lambda: job.status() == "IN_PROGRESS")
    wait_until(lambda: f"start {job.job_id}" in notes.read_text())
    assert job.cancel() == {"id": job.job_id, "status": "CANCELLED"}
    wait_until(lambda: f"cancelled {job.job_id}" in notes.read_text())
    assert echo.get(f"status/{job.job_id}")["status"] == "CANCELLED"
    assert echo.get("health")["jobs"]["inProgress"] == 0


def test_a_cancel_that_comes_before_the_sdk_has_started_the_job(echo: Client, notes: Path) -> None:
    name = echo.run(sleep=60)
    wait_until(lambda: echo.get(f"status/{name}")["status"] == "IN_PROGRESS")
    echo.post(f"cancel/{name}")
    wait_until(lambda: f"cancelled {name}" in notes.read_text())


def test_progress_is_shown_while_the_job_runs(echo: Client, tmp_path: Path) -> None:
    name = echo.run(progress={"percent": 5}, gate=str(tmp_path / "gate"))
    wait_until(lambda: echo.get(f"status/{name}").get("output") == {"percent": 5})
    assert echo.get(f"status/{name}")["status"] == "IN_PROGRESS"
    (tmp_path / "gate").touch()
    assert echo.wait(name)["status"] == "COMPLETED"


def test_cancel_in_the_queue_and_purge(echo: Client, notes: Path) -> None:
    busy = [echo.run(sleep=60) for _ in range(16)]
    wait_until(lambda: echo.get("health")["jobs"]["inProgress"] == 16)
    waiting = [echo.run(n=n) for n in range(4)]
    assert echo.post(f"cancel/{waiting[0]}")["status"] == "CANCELLED"
    assert echo.post("purge-queue") == {"removed": 3, "status": "completed"}
    assert echo.get("health")["jobs"]["inQueue"] == 0
    for name in busy:
        echo.post(f"cancel/{name}")
    assert echo.runsync(after="it")["status"] == "COMPLETED"
    assert not any(name in notes.read_text() for name in waiting)


def test_execution_timeout(echo: Client, notes: Path) -> None:
    job = echo.post("runsync", {"input": {"sleep": 60}, "policy": {"executionTimeout": 2000}})
    assert (job["status"], job["error"]) == ("TIMED_OUT", "executionTimeout exceeded")
    assert job["executionTime"] >= 2000
    wait_until(lambda: f"cancelled {job['id']}" in notes.read_text())
    again = echo.post(f"retry/{job['id']}")
    assert again == {"id": job["id"], "status": "IN_QUEUE"}
    assert echo.wait(job["id"])["status"] == "TIMED_OUT"
    wait_until(lambda: notes.read_text().count(f"start {job['id']}") == 2)


def test_runsync_answers_with_the_state_when_its_wait_is_over(echo: Client) -> None:
    for wait in (1000, -1, "nan"):
        job = echo("POST", f"runsync?wait={wait}", {"input": {"sleep": 170}}).json()
        assert job["status"] in ("IN_QUEUE", "IN_PROGRESS")
        assert echo.post(f"cancel/{job['id']}")["status"] == "CANCELLED"
    assert echo("POST", "runsync?wait=soon", {"input": {"n": 1}}).status_code == 400


def test_a_client_that_hangs_up_leaves_its_job_running(echo: Client, notes: Path, tmp_path: Path) -> None:
    before = notes.read_text().count("end ")
    with pytest.raises(requests.Timeout):
        echo("POST", "runsync", {"input": {"gate": str(tmp_path / "gate")}}, timeout=3)
    (tmp_path / "gate").touch()
    wait_until(lambda: notes.read_text().count("end ") == before + 1)


@pytest.mark.parametrize(("path", "limit"), [("run", 10), ("runsync", 20)])
def test_requests_over_the_limit_get_what_runpod_answers(echo: Client, path: str, limit: int) -> None:
    def body(size: int) -> bytes:
        text = b'{"input": {"sleep": 0, "text": "%s"}}'
        return text % (b"x" * (size - len(text) + 2))

    size = limit * 2**20
    fits = echo("POST", path, data=body(size))
    assert fits.status_code == 200
    assert fits.json()["status"] in ("IN_QUEUE", "COMPLETED")
    answer = echo("POST", path, data=body(size + 1))
    assert answer.status_code == 400
    assert f"exceeded max body size of {limit}MiB" in answer.json()["error"]

    # Without a length that would betray it beforehand.
    chunks = (b"x" * 2**20 for _ in range(limit + 1))
    assert echo("POST", path, data=chunks).status_code == 400


NESTED = '{"input": ' + "[" * 100_000 + "]" * 100_000 + "}"


@pytest.mark.parametrize("body", ["", "{", '{"prompt": 1}', '{"input": NaN}', "[]", "\xff", NESTED])
def test_wrong_bodies_are_refused(echo: Client, body: str) -> None:
    for path in ("run", "runsync"):
        answer = echo("POST", path, data=body.encode("latin-1"))
        assert answer.status_code == 400
        assert answer.json()["error"]


def test_unknown_jobs_and_routes(echo: Client) -> None:
    for method, path in (("GET", "status"), ("GET", "stream"), ("POST", "cancel"), ("POST", "retry")):
        assert echo(method, f"{path}/nothing").status_code == 404
    assert echo("GET", "openai/v2/models").status_code == 404


def test_half_a_surrogate_pair_does_not_keep_a_job_from_its_worker(echo: Client) -> None:
    answer = echo.runsync(**{"text": "a\ud83d", "return": "error"})
    assert (answer["status"], answer["error"]) == ("FAILED", "no luck"), "it ran, and said so"


def test_what_becomes_of_odd_results(echo: Client) -> None:
    raised = echo.runsync(**{"raise": "oh no"})
    assert raised["status"] == "FAILED"
    assert json.loads(raised["error"])["error_message"] == "oh no"
    failed = echo.runsync(**{"return": "error"})
    assert (failed["status"], failed["error"]) == ("FAILED", "no luck")
    for kind in ("nan", "dict_error"):
        lost = echo.runsync(**{"return": kind})
        assert lost["status"] == "COMPLETED"
        assert not {"output", "error"} & set(lost)
    for name, big in ((echo.run(big=11 * 2**20), False), (echo.run(big=9 * 2**20), True)):
        assert ("output" in echo.wait(name)) is big


def test_jobs_live_as_long_as_pings_name_them(echo: Client) -> None:
    # The SDK cannot send this one's result and forgets it; the platform has to miss it, twice.
    unsent = echo.run(**{"return": "bytes"})
    kept = echo.runsync(block=1, sleep=RULES.ping_interval * RULES.missed_pings + 2)
    assert kept["status"] == "COMPLETED"
    assert "retries" not in kept
    job = echo.wait(unsent)
    assert (job["status"], job["error"]) == ("FAILED", "job timed out after 1 retries")
    assert job["retries"] == 1


def test_the_webhook_is_called_until_it_answers_200(echo: Client) -> None:
    calls: list[bytes] = []

    class Hook(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            calls.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200 if len(calls) == 2 else 500)
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hook) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/hook"
        job = echo.post("runsync", {"input": {"n": 1}, "webhook": url})
        wait_until(lambda: len(calls) == 2)
        time.sleep(3 * RULES.webhook_delay)
        server.shutdown()
    assert [json.loads(call) for call in calls] == [job, job]
