"""Workers that start together, are killed, or find the volume read-only or full.

Every start is a process of its own, with the unmodified huggingface_hub and a hub on loopback.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import pytest

from shared import hub as hub_module
from shared.hub import HubUnreachable
from shared.volume import resolve_model
from tests.helpers import wait_until
from tests.hub import Hub, safetensors
from tests.machine import DEAD_HUB, MODEL, content, use_machine, write

REPOSITORY = Path(__file__).parents[2]
# Twelve shards of different sizes, so that they are complete at different moments.
SHARDS = {f"model-{n:05d}-of-00012.safetensors": safetensors(10_000 * n, n) for n in range(1, 13)}
INDEX = {"weight_map": {f"w{number}": name for number, name in enumerate(SHARDS)}}
FILES = {
    "config.json": b"{}",
    "tokenizer.json": b'{"a": 1}',
    "model.safetensors.index.json": json.dumps(INDEX).encode(),
    **SHARDS,
}


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with Hub() as hub:
        hub.push(MODEL, {**FILES, "pytorch_model.bin": b"x"})
        yield hub


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "cache").mkdir()
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.setenv("HF_HUB_DOWNLOAD_TIMEOUT", "100")
    monkeypatch.setattr(Start, "logs", tmp_path)
    yield use_machine(tmp_path, hub, monkeypatch)
    for start in Start.every:
        start.kill()
    Start.every.clear()


class Start:
    """A process that is about to resolve the model; `go` lets it."""

    every: ClassVar[list[Start]] = []
    logs: ClassVar[Path] = Path()

    def __init__(self, *inside: str, **settings: object) -> None:
        self._log = self.logs / f"start-{len(self.every)}.log"
        self.every.append(self)
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                [*inside, sys.executable, "-m", "tests.faults.start", MODEL],
                env={**os.environ, **{name: str(value) for name, value in settings.items()}},
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                text=True,
            )
        self.wait_for_log("ready\n")

    @property
    def log(self) -> str:
        return self._log.read_text()

    def wait_for_log(self, part: str) -> None:
        wait_until(lambda: part in self.log or self.process.poll() is not None)
        assert part in self.log

    def go(self) -> Start:
        assert self.process.stdin
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self

    def end(self) -> dict[str, Any]:
        """Its last line."""
        self.process.communicate(timeout=120)
        assert self.process.returncode == 0, self.log
        *_, last = (line for line in self.log.splitlines() if line.startswith("{"))
        result: dict[str, Any] = json.loads(last)
        return result

    def kill(self) -> bool:
        """Whether it was still running."""
        was_running = self.process.poll() is None
        self.process.kill()
        self.process.communicate()
        return was_running


def is_complete(folder: str | Path) -> bool:
    return content(Path(folder)) == FILES


def wait_for_download(hub: Hub) -> None:
    """Until the hub has sent some of the weights."""
    wait_until(lambda: any("GET /cdn" in request["line"] and request["sent"] for request in hub.requests()))


# ---- together -------------------------------------------------------------------------------------------


@pytest.mark.engine
def test_eight_that_start_together_download_once(hub: Hub) -> None:
    hub.fault("GET /cdn", hold=5000)
    starts = [Start() for _ in range(8)]
    for start in starts:
        start.go()
    wait_for_download(hub)
    waiting = "waiting for another worker"
    wait_until(lambda: sum(waiting in start.log for start in starts) == 7)
    hub.go_on()
    results = [start.end() for start in starts]
    assert sorted(one["source"] for one in results) == ["download"] + ["volume"] * 7
    assert len({one["path"] for one in results}) == 1
    assert is_complete(results[0]["path"])
    assert {path: hub.got(path) for path in FILES} == dict.fromkeys(FILES, 1)
    assert hub.got("pytorch_model.bin") == 0
    assert sum("/api/models" in request["line"] for request in hub.requests()) == 2, "by one of them"


@pytest.mark.engine
def test_another_worker_takes_over_from_a_killed_one(hub: Hub, machine: Path) -> None:
    hub.fault("GET /cdn", hold=5000)
    starts = [Start() for _ in range(4)]
    for start in starts:
        start.go()
    wait_for_download(hub)
    (held,) = (machine / "volume").rglob(".locks/*@main.lease")
    holder = int(re.search(r"^pid=(\d+)$", held.read_text(), re.MULTILINE)[1])  # type: ignore[index]
    (first,) = [start for start in starts if start.process.pid == holder]
    assert first.kill()
    hub.go_on()
    results = [start.end() for start in starts if start is not first]
    assert sorted(one["source"] for one in results) == ["download", "volume", "volume"]
    assert all(is_complete(one["path"]) for one in results)
    assert max(hub.got(path) for path in FILES) <= 2


@pytest.mark.engine
def test_two_hosts_download_once(hub: Hub) -> None:
    """The second waits for longer than LEASE_S, while the first one's heartbeat goes on."""
    hub.fault("GET /cdn", hold=5000)
    here = Start(TEST_HOST="here", TEST_LEASE_S=4).go()
    wait_for_download(hub)
    there = Start(TEST_HOST="there", TEST_LEASE_S=4).go()
    there.wait_for_log("waiting for another worker")
    time.sleep(5)
    hub.go_on()
    result = there.end()
    assert (here.end()["source"], result["source"], is_complete(result["path"])) == (
        "download",
        "volume",
        True,
    )
    assert {hub.got(path) for path in FILES} == {1}


@pytest.mark.engine
def test_a_lost_host_is_taken_over_when_its_heartbeat_stands_still(hub: Hub) -> None:
    hub.fault("GET /cdn", hold=5000)
    here = Start(TEST_HOST="here", TEST_LEASE_S=2).go()
    wait_for_download(hub)
    assert here.kill()
    hub.mend()
    there = Start(TEST_HOST="there", TEST_LEASE_S=2).go()
    result = there.end()
    assert (result["source"], is_complete(result["path"])) == ("download", True)
    assert "waiting for another worker" in there.log


# ---- killed ---------------------------------------------------------------------------------------------


@pytest.mark.engine
def test_twenty_kills_leave_no_model(hub: Hub, machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.fault("GET /cdn", rate=100_000)
    monkeypatch.setattr(hub_module, "RETRY_S", ())
    numbers = random.Random(20)
    duration = 5.0
    in_the_middle = 0
    while in_the_middle < 20:
        start, moment = Start().go(), numbers.random() * duration
        with suppress(subprocess.TimeoutExpired):
            start.process.wait(moment)
            duration = max(0.1, moment)  # a download takes less
        in_the_middle += start.kill()
        assert "waiting for another worker" not in start.log, "the lock of a killed process is free at once"
        with monkeypatch.context() as patch:
            patch.setenv("HF_ENDPOINT", DEAD_HUB)
            try:
                model = resolve_model(MODEL)
            except HubUnreachable:
                continue
        assert is_complete(model.path), "an incomplete copy was used"
        shutil.rmtree(machine / "volume" / "huggingface-cache")
    hub.mend()
    last = Start().go()
    assert is_complete(last.end()["path"])


# ---- the volume -----------------------------------------------------------------------------------------


def mounted(*commands: str) -> list[str]:
    """The beginning of a command line that runs in mounts of its own; skips where those are not permitted."""
    as_root = [] if os.geteuid() == 0 else ["--map-root-user"]
    inside = ["unshare", "--mount", *as_root, "sh", "-c", " && ".join([*commands, 'exec "$@"']), "sh"]
    probe = [*inside, sys.executable, "-c", ""]
    if shutil.which("unshare") is None or subprocess.run(probe, capture_output=True).returncode:
        pytest.skip("mounts are not permitted here")
    return inside


def small(folder: Path) -> str:
    return f"mount -t tmpfs -o size=400k tmpfs {folder}"


def read_only(folder: Path) -> str:
    return f"mount --bind {folder} {folder} && mount -o remount,bind,ro {folder}"


def test_read_only_everywhere_is_a_clear_error(hub: Hub, machine: Path) -> None:
    inside = mounted(read_only(machine / "volume"), read_only(machine / "cache"))
    result = Start(*inside).go().end()
    assert result["code"] == "read_only"
    assert "Read-only file system" in result["message"]


def test_a_read_only_host_cache_is_used_without_a_request(hub: Hub, machine: Path) -> None:
    """A complete copy without the hub's tree, under the model's own name."""
    folder = machine / "volume/huggingface-cache/hub/models--Org--Some-Model/snapshots" / ("c" * 40)
    write(folder, FILES)
    result = Start(*mounted(read_only(machine / "volume"))).go().end()
    assert (result["source"], result["path"]) == ("host-cache", str(folder))
    assert hub.requests() == []


def test_a_volume_that_fills_up_is_left_empty(hub: Hub, machine: Path) -> None:
    """Its free space says nothing, as with a quota: ENOSPC comes in the middle."""
    start = Start(*mounted(small(machine / "volume")), TEST_SPACE=1).go()
    result = start.end()
    assert is_complete(result["path"])
    assert result["path"].startswith(f"{machine}/cache/")
    assert result["left"] == []
    assert "No space left" in start.log


def test_a_full_disk_is_a_clear_error(hub: Hub, machine: Path) -> None:
    inside = mounted(small(machine / "volume"), small(machine / "cache"))
    result = Start(*inside, TEST_SPACE=1).go().end()
    assert result["code"] == "no_space"
    assert result["again"]["code"] == "unreachable", "no leftover may count as complete"
    assert result["left"] == []


def test_files_that_cannot_be_written_in_full(hub: Hub) -> None:
    """The same without mounts: the system refuses to let a file grow beyond 60 kB (EFBIG)."""
    result = Start(TEST_LIMIT=60_000).go().end()
    assert result["code"] == "no_space"
    assert result["again"]["code"] == "unreachable"
    assert result["left"] == []
    assert is_complete(Start().go().end()["path"])
