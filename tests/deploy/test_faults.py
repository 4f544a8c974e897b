"""What goes wrong at RunPod, on the way to it, or here: named, and nothing is left behind."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import pytest
from starlette.responses import Response

from deploy import commands
from deploy.api import Api, ApiError
from deploy.commands import Session
from deploy.plans import Conflict, Order
from tests.deploy.conftest import PACE, WORKER, Cli
from tests.deploy.stand_in import KEY, Account, interrupt, problem


@pytest.mark.parametrize(
    ("tag", "cause", "message", "line"),
    [
        ("crash", "crash_loop", "The workers do not get ready", "container: CUDA out of memory"),
        ("restart", "crash_loop", "The workers do not get ready", None),
        ("throttled", "no_capacity", "No machine is free in AMPERE_16, ADA_24", None),
        ("none", "no_capacity", "No machine is free in AMPERE_16, ADA_24", None),
        ("noimage", "wrong_image", "RunPod cannot pull docker.io/me/worker-", "manifest unknown"),
        ("nosecret", "missing_secret", "The account has no RunPod secret hf:", None),
        ("jobfails", "failed", "The disk is full. no_space", "container: Worker ready."),
        ("never", "timeout", "No answer within 0 s", None),
    ],
)
@pytest.mark.parametrize("type_", ["queue", "http"])
def test_failed_release_is_named_and_the_earlier_one_is_back(
    runpod: Account, cli: Cli, tag: str, cause: str, message: str, line: str | None, type_: str
) -> None:
    cli("deploy", "--tag=1.0.0", f"--type={type_}", env={"A": "1"})
    cli.pace = replace(PACE, total=0.4 if tag == "never" else PACE.total)
    before = runpod.named(WORKER)
    result = cli.json("deploy", f"--tag=1.0.1-{tag}", env={"A": "2"})
    assert (result["exit"], result["cause"]) == (1, cause)
    assert message in cli.err
    assert "The earlier release is back." in cli.err
    assert line is None or any(line in text for text in result["log"])
    assert runpod.named(WORKER) == before
    assert cli("rollback") == 6, "a release that failed is none"


def test_earlier_release_that_cannot_be_put_back_is_reported_with_the_cause(
    runpod: Account, cli: Cli
) -> None:
    cli("deploy", "--tag=1.0.0")
    refused = problem(403, "access denied")
    runpod.before = lambda method, path: (
        refused if "looked" in runpod.starting and method == "PATCH" else None
    )
    runpod.after = lambda method, path: runpod.starting.add("looked") if path.endswith("/workers") else None
    assert cli("deploy", "--tag=1.0.1-crash") == 1
    assert "The workers do not get ready" in cli.err
    assert "The earlier release is not back: RUNPOD_API_KEY may not do this: access denied (403)." in cli.err


def test_first_release_that_fails_is_stopped(runpod: Account, cli: Cli) -> None:
    assert cli("deploy", "--tag=1.0.0-crash") == 1
    assert "no earlier release: the endpoint is stopped" in cli.err
    (endpoint,) = runpod.named(WORKER)
    assert (endpoint["workers"]["min"], endpoint["workers"]["max"]) == (0, 0)
    assert cli("deploy", "--tag=1.0.1") == 0
    assert runpod.named(WORKER)[0]["workers"]["max"] == 3
    assert cli("rollback") == 6


def test_failure_after_another_type_gives_the_earlier_endpoint_anew(runpod: Account, cli: Cli) -> None:
    cli("deploy", "--tag=1.0.0")
    assert cli("deploy", "--tag=1.0.1-crash", "--type=http", "--yes") == 1
    (endpoint,) = runpod.named(WORKER)
    assert (endpoint["type"], endpoint["image"][-6:]) == ("QUEUE", ":1.0.0")


# ---- the API -------------------------------------------------------------------------------------------


class Failing:
    """A fault for the request number `at`, counted from 0."""

    def __init__(self, at: int, what: Any) -> None:
        self.at, self.what, self.count = at, what, -1

    def __call__(self, method: str, path: str) -> Any:
        self.count += 1
        return (self.what() if callable(self.what) else self.what) if self.count == self.at else None


def server_error() -> Response:
    return problem(500, "internal error")


FAULTS = {
    "500": ("before", server_error),
    "lost answer": ("after", "drop"),
}


def until_no_fault_strikes(runpod: Account, cli: Cli, when: str, what: Any, check: Any) -> None:
    """Deploy anew and then an update, with the fault at the first request, then at the second, and so on."""
    for arguments in (("--tag=1.0.0",), ("--tag=1.0.1",)):
        at, struck = 0, True
        while struck:
            fault = Failing(at, what)
            setattr(runpod, when, fault)
            status = cli("deploy", *arguments, env={"AT": str(at)})
            setattr(runpod, when, lambda method, path: None)
            struck, at = fault.count >= at, at + 1
            check(status, struck, arguments, at)
            if arguments == ("--tag=1.0.0",):
                cli("destroy", "--yes")
        if arguments == ("--tag=1.0.0",):
            cli("deploy", *arguments)


@pytest.mark.parametrize("fault", FAULTS)
def test_one_fault_at_any_request_of_a_deploy_is_overcome(runpod: Account, cli: Cli, fault: str) -> None:
    def check(status: int, struck: bool, arguments: Any, at: int) -> None:
        assert (status, len(runpod.named(WORKER))) == (0, 1), (cli.err, at)

    until_no_fault_strikes(runpod, cli, *FAULTS[fault], check)


@pytest.mark.parametrize("when", ["before", "after"])
def test_ctrl_c_at_any_request_leaves_what_the_next_deploy_completes(
    runpod: Account, cli: Cli, when: str
) -> None:
    def check(status: int, struck: bool, arguments: Any, at: int) -> None:
        assert status == (130 if struck else 0)
        assert not struck or "make deploy-sentence-transformers goes on from here" in cli.err
        assert len(runpod.named(WORKER)) <= 1
        if struck:
            assert cli("deploy", *arguments, env={"AT": "again"}) == 0
            assert [endpoint["env"] for endpoint in runpod.named(WORKER)] == [{"AT": "again"}]

    until_no_fault_strikes(runpod, cli, when, interrupt, check)


def test_ctrl_c_in_an_update_can_be_rolled_back(runpod: Account, cli: Cli) -> None:
    cli("deploy", "--tag=1.0.0")
    runpod.after = lambda method, path: interrupt() if method == "PATCH" and "serverless" in path else None
    assert cli("deploy", "--tag=1.0.1") == 130
    runpod.after = lambda method, path: None
    assert runpod.named(WORKER)[0]["image"].endswith(":1.0.1")
    assert cli("rollback") == 0
    assert runpod.named(WORKER)[0]["image"].endswith(":1.0.0")


def test_endless_500_ends_in_one_sentence(runpod: Account, cli: Cli) -> None:
    runpod.before = lambda method, path: server_error()
    assert cli("deploy", "--tag=1.0.0") == 3
    assert cli.err == "RunPod refused GET /v2/serverless: internal error (500).\n"


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (problem(401, f"bad token {KEY}"), "RunPod does not accept RUNPOD_API_KEY: bad token *** (401)."),
        (problem(403, "access denied"), "RUNPOD_API_KEY may not do this: access denied (403)."),
        (
            problem(422, "Request validation failed.", errors=["/gpu: no", "/env: no"]),
            "RunPod refused POST /v2/serverless: Request validation failed; /gpu: no; /env: no (422).",
        ),
        (problem(429, "used up", {"Retry-After": "1800"}), "RunPod's rate limit is used up: used up (429)."),
    ],
)
def test_refusal_is_one_sentence(runpod: Account, cli: Cli, answer: Response, sentence: str) -> None:
    runpod.before = lambda method, path: answer if method == "POST" else None
    assert cli("deploy", "--tag=1.0.0") == 3
    assert cli.err.splitlines()[-1] == sentence


def test_waits_are_those_that_the_answers_ask_for(runpod: Account) -> None:
    waits: list[float] = []
    api = Api(KEY, back_off=0.25, sleep=waits.append)
    runpod.before = Failing(0, lambda: problem(429, "no", {"Retry-After": "7"}))
    api.endpoints()
    assert waits == [0, 7, 0]
    limited = {"RateLimit": '"minute";r=0;t=12, "hour";r=9;t=1812'}
    waits.clear()
    runpod.before = Failing(0, lambda: problem(429, "no", limited))
    api.endpoints()
    assert waits == [0, 12, 0]
    waits.clear()
    runpod.before = Failing(0, server_error)
    api.endpoints()
    assert waits == [0, 0.25, 0]


def test_used_up_window_holds_back_the_next_request(runpod: Account) -> None:
    waits: list[float] = []
    api = Api(KEY, sleep=waits.append)
    runpod.before = Failing(
        0, lambda: Response(b'{"endpoints": []}', headers={"RateLimit": '"minute";r=0;t=12'})
    )
    assert api.endpoints() == []
    api.endpoints()
    assert waits[0] == 0
    assert 11 < waits[1] <= 12


def test_nobody_there_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUNPOD_API_BASE_URL", "http://127.0.0.1:9")
    with pytest.raises(ApiError, match=r"RunPod cannot be reached at http://127.0.0.1:9"):
        Api(KEY, back_off=0).endpoints()


# ---- two at once -----------------------------------------------------------------------------------------


def test_two_of_one_name_are_refused(runpod: Account, cli: Cli) -> None:
    cli("deploy", "--tag=1.0.0")
    runpod.create({**runpod.endpoints["ep1"], "id": "twin"}, "twin")
    for command in ("plan", "deploy", "rollback", "status", "destroy"):
        assert cli(command, "--tag=1.0.1") == 4
        assert "There are 2 endpoints named sentence-transformers: ep1 and twin" in cli.err


def test_two_deploys_at_once_leave_one_endpoint(runpod: Account) -> None:
    both = threading.Barrier(2, timeout=10)
    runpod.after = lambda method, path: (
        both.wait() and None if (method, path) == ("POST", "/v2/serverless") else None
    )
    ended: list[object] = []

    def deploy() -> None:
        order = Order(WORKER, WORKER, tag="1.0.0")
        session = Session(Api(KEY, back_off=0.01), order, PACE, lambda line: None, yes=True)
        try:
            ended.append(commands.deploy(session)["endpoint"]["id"])
        except Conflict as error:
            ended.append(error)

    threads = [threading.Thread(target=deploy) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (endpoint,) = runpod.named(WORKER)
    conflict = next(item for item in ended if isinstance(item, Conflict))
    assert set(ended) == {endpoint["id"], conflict}
    assert f"Another deploy made {WORKER} at the same time, as {endpoint['id']}" in str(conflict)


def test_second_endpoint_that_appears_during_the_wait_is_reported(runpod: Account, cli: Cli) -> None:
    def twin(method: str, path: str) -> None:
        if path.endswith("/workers") and "twin" not in runpod.endpoints:
            runpod.create({**runpod.endpoints["ep1"], "id": "twin"}, "twin")

    runpod.before = twin
    assert cli("deploy", "--tag=1.0.0") == 4
    assert "There are 2 endpoints named sentence-transformers: ep1 and twin" in cli.err


@pytest.mark.parametrize("tag", ["1.0.1", "1.0.1-crash"])
def test_change_by_another_deploy_meanwhile_stays(runpod: Account, cli: Cli, tag: str) -> None:
    cli("deploy", "--tag=1.0.0")
    looks = 0

    def other(method: str, path: str) -> None:
        nonlocal looks
        looks += path.endswith("/workers")
        if looks == 2:
            runpod.update("ep1", {"timeout": 1234})

    runpod.before = other
    assert cli("deploy", f"--tag={tag}") == 4
    assert "Another deploy changed sentence-transformers meanwhile" in cli.err
    assert runpod.endpoints["ep1"]["timeout"] == 1234
    assert runpod.endpoints["ep1"]["image"].endswith(tag)


def test_job_of_a_failed_deploy_is_cancelled(runpod: Account, cli: Cli) -> None:
    cli.pace = replace(PACE, total=0.1)
    cli("deploy", "--tag=1.0.0-never")
    assert runpod.cancelled == ["ep1"]
