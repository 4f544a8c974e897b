"""The platform with a worker in a container. `docker` is a shell script here that starts the handler itself;
with a real engine the same is tried in tests/images/built.py."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import requests

from local import Container, running
from tests.helpers import wait_until
from tests.local.conftest import HANDLERS, RULES, Client

pytestmark = pytest.mark.engine

DOCKER = """#!/bin/sh
echo "$@" >> {log}
[ "$1" = run ] || exit 0
for word; do
    case $word in --env=*) names="$names ${{word#--env=}}" ;; esac
done
cd {handlers}
exec env -i PATH="$PATH" PYTHONPATH={root} $(for name in $names; do eval "echo $name=\\"\\$$name\\""; done) \\
    {python} -u {handler}
"""


@pytest.fixture
def docker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
    """The log of a `docker` that starts the handler which the test names."""
    log = tmp_path / "log"
    script = DOCKER.format(
        log=log, handlers=HANDLERS, handler=request.param, python=sys.executable, root=HANDLERS.parents[2]
    )
    (tmp_path / "docker").write_text(script)
    (tmp_path / "docker").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("LEFT_OUT", "of this machine")
    return log


@pytest.mark.parametrize("docker", ["echo.py"], indirect=True)
def test_a_container_is_run_drained_and_removed(docker: Path, tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    env = {"NOTES": str(notes), "RUNPOD_LOG_LEVEL": "INFO"}
    container = Container("an/image:dev", ["--read-only"])
    with running(HANDLERS / "echo.py", container=container, env=env, rules=RULES) as platform:
        client = Client(platform)
        (worker,) = platform.workers
        assert client.runsync(value=5)["status"] == "COMPLETED"
        (run,) = docker.read_text().splitlines()
        assert run.endswith("--read-only an/image:dev")
        assert "--env=NOTES" in run
        assert "--env=RUNPOD_WEBHOOK_GET_JOB" in run
        assert "LEFT_OUT" not in run
        assert str(notes) not in run, "every user of the machine can read a command line"
        worker.kill()
        wait_until(lambda: platform.workers[0].id != worker.id and platform.workers[0].state == "idle")
        assert client.runsync(value=6)["status"] == "COMPLETED"
        replacement = platform.workers[0]
    removed = [line.split()[-1] for line in docker.read_text().splitlines() if line.startswith("rm")]
    assert removed == [Container.name(worker.id), Container.name(replacement.id)]
    assert replacement.returncode == 0, "SIGTERM reached the worker, which ended by itself"


@pytest.mark.parametrize("docker", ["web.py"], indirect=True)
def test_a_container_serves_http(docker: Path) -> None:
    container = Container("an/image:dev")
    with running(HANDLERS / "web.py", mode="http", container=container, rules=RULES) as endpoint:
        answer = requests.get(f"{endpoint.base_url}/echo", headers={"Authorization": "any"}, timeout=60)
        assert answer.status_code == 418
    run = docker.read_text().splitlines()[0]
    assert {"--env=SERVE_MODE", "--env=PORT", "--env=PORT_HEALTH"} < set(run.split())
    assert "--env=RUNPOD_WEBHOOK_GET_JOB" not in run
    assert endpoint.workers == []
