"""Workers that start together, are killed, or find the volume read-only or full.

Every start is a process of its own, with the unmodified huggingface_hub and a hub on loopback.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import pytest
from huggingface_hub import constants

from shared import volume
from shared.volume import HubUnreachable, resolve_model
from tests.hub import Hub, safetensors

NAME = "Org/Some-Model"
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
def the_hub() -> Iterator[Hub]:
    with Hub() as hub:
        hub.push(NAME, {**FILES, "pytorch_model.bin": b"x"})
        yield hub


@pytest.fixture
def hub(the_hub: Hub) -> Hub:
    the_hub.mend()
    return the_hub


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, the_hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "volume").mkdir()
    (tmp_path / "disk").mkdir()
    variables = {
        "RUNPOD_VOLUME_PATH": str(tmp_path / "volume"),
        "XDG_CACHE_HOME": str(tmp_path / "disk"),
        "BAKED_MODEL_DIR": str(tmp_path / "models"),
        "RUNPOD_MODEL_STORE": str(tmp_path / "store"),
        "HF_ENDPOINT": the_hub.url,
        "PYTHONPATH": str(REPOSITORY),
        "HF_HUB_DOWNLOAD_TIMEOUT": "100",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    for name in ("HF_HOME", "HF_HUB_CACHE", "HF_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(volume, "_offline_is_ours", False)
    monkeypatch.setattr(Start, "logs", tmp_path)
    yield tmp_path
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
                [*inside, sys.executable, "-m", "tests.volume_start", NAME],
                env={**os.environ, **{name: str(value) for name, value in settings.items()}},
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                text=True,
            )
        self.until_it_says("ready\n")

    @property
    def log(self) -> str:
        return self._log.read_text()

    def until_it_says(self, part: str) -> None:
        until(lambda: part in self.log or self.process.poll() is not None)
        assert part in self.log

    def go(self) -> Start:
        assert self.process.stdin
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self

    def end(self) -> dict[str, Any]:
        """What it said last."""
        self.process.communicate(timeout=120)
        assert self.process.returncode == 0, self.log
        *_, last = (line for line in self.log.splitlines() if line.startswith("{"))
        said: dict[str, Any] = json.loads(last)
        return said

    def kill(self) -> bool:
        """Whether it was still at work."""
        at_work = self.process.poll() is None
        self.process.kill()
        self.process.communicate()
        return at_work


def right(folder: str | Path) -> bool:
    found = {str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}
    return found == FILES


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.02)


def wait_for_download(hub: Hub) -> None:
    """Until the hub has sent some of the weights."""
    until(lambda: any("GET /cdn" in request["line"] and request["sent"] for request in hub.requests()))


# ---- together -------------------------------------------------------------------------------------------


@pytest.mark.engine
def test_eight_that_start_together_download_once(hub: Hub) -> None:
    hub.fault("GET /cdn", hold=5000)
    starts = [Start() for _ in range(8)]
    for start in starts:
        start.go()
    wait_for_download(hub)
    waiting = "waiting for another worker"
    until(lambda: sum(waiting in start.log for start in starts) == 7)
    hub.go_on()
    said = [start.end() for start in starts]
    assert sorted(one["source"] for one in said) == ["download"] + ["volume"] * 7
    assert len({one["path"] for one in said}) == 1
    assert right(said[0]["path"])
    assert {path: hub.got(path) for path in FILES} == dict.fromkeys(FILES, 1)
    assert hub.got("pytorch_model.bin") == 0
    assert sum("/api/models" in request["line"] for request in hub.requests()) == 2, "by one of them"


@pytest.mark.engine
def test_when_the_one_that_downloads_is_killed_another_goes_on(hub: Hub, machine: Path) -> None:
    hub.fault("GET /cdn", hold=5000)
    starts = [Start() for _ in range(4)]
    for start in starts:
        start.go()
    wait_for_download(hub)
    (held,) = (machine / "volume").rglob(".locks/*@main/1")
    holder = json.loads(held.read_text())["pid"]
    (first,) = [start for start in starts if start.process.pid == holder]
    assert first.kill()
    hub.go_on()
    said = [start.end() for start in starts if start is not first]
    assert sorted(one["source"] for one in said) == ["download", "volume", "volume"]
    assert all(right(one["path"]) for one in said)
    assert max(hub.got(path) for path in FILES) <= 2


@pytest.mark.engine
def test_two_hosts_download_once(hub: Hub) -> None:
    """The second waits for longer than STALE_S, while the first one's heartbeat goes on."""
    hub.fault("GET /cdn", hold=5000)
    here = Start(TEST_HOST="here", TEST_STALE_S=4).go()
    wait_for_download(hub)
    there = Start(TEST_HOST="there", TEST_STALE_S=4).go()
    there.until_it_says("waiting for another worker")
    time.sleep(5)
    hub.go_on()
    said = there.end()
    assert (here.end()["source"], said["source"], right(said["path"])) == ("download", "volume", True)
    assert {hub.got(path) for path in FILES} == {1}


@pytest.mark.engine
def test_a_lost_host_is_taken_over_when_its_heartbeat_stands_still(hub: Hub) -> None:
    hub.fault("GET /cdn", hold=5000)
    here = Start(TEST_HOST="here", TEST_STALE_S=2).go()
    wait_for_download(hub)
    assert here.kill()
    hub.mend()
    there = Start(TEST_HOST="there", TEST_STALE_S=2).go()
    said = there.end()
    assert (said["source"], right(said["path"])) == ("download", True)
    assert "taken over" in there.log


# ---- killed ---------------------------------------------------------------------------------------------


@pytest.mark.engine
def test_twenty_kills_leave_nothing_that_passes_for_whole(
    hub: Hub, machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL at random moments of a download. What one leaves, the next one finds."""
    hub.fault("GET /cdn", rate=100_000)
    monkeypatch.setattr(volume, "RETRY_S", ())
    chance = random.Random(20)
    duration = 5.0
    in_the_middle = 0
    while in_the_middle < 20:
        start, moment = Start().go(), chance.random() * duration
        with suppress(subprocess.TimeoutExpired):
            start.process.wait(moment)
            duration = max(0.1, moment)  # so long it does not take
        in_the_middle += start.kill()
        assert "waiting for another worker" not in start.log, "the lock of a killed process is free at once"
        with monkeypatch.context() as patch:
            patch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
            try:
                model = resolve_model(NAME)
            except HubUnreachable:
                continue
        assert right(model.path), "a partial model was taken for a whole one"
        shutil.rmtree(machine / "volume" / "huggingface-cache")
    hub.mend()
    last = Start().go()
    assert right(last.end()["path"])


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


def test_a_read_only_volume_is_passed_over(hub: Hub, machine: Path) -> None:
    start = Start(*mounted(read_only(machine / "volume"))).go()
    said = start.end()
    assert said["path"].startswith(f"{machine}/disk/")
    assert right(said["path"])
    assert "no download into" in start.log
    assert "Read-only file system" in start.log


def test_read_only_everywhere_is_a_clear_error(hub: Hub, machine: Path) -> None:
    inside = mounted(read_only(machine / "volume"), read_only(machine / "disk"))
    said = Start(*inside).go().end()
    assert said["code"] == "read_only"
    assert "Read-only file system" in said["message"]


def test_a_read_only_host_cache_is_used_without_a_request(hub: Hub, machine: Path) -> None:
    """A whole copy that no list came with, under its right name."""
    folder = machine / "volume/huggingface-cache/hub/models--Org--Some-Model/snapshots" / ("c" * 40)
    for path, data in FILES.items():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    said = Start(*mounted(read_only(machine / "volume"))).go().end()
    assert (said["source"], said["path"]) == ("host-cache", str(folder))
    assert hub.requests() == []


def test_a_volume_that_is_too_small_is_passed_over(hub: Hub, machine: Path) -> None:
    start = Start(*mounted(small(machine / "volume"))).go()
    said = start.end()
    assert right(said["path"])
    assert said["path"].startswith(f"{machine}/disk/")
    assert "0.8 MB needed, 0.4 MB free" in start.log
    assert {hub.got(path) for path in FILES} == {1}


def test_a_volume_that_fills_up_is_left_empty(hub: Hub, machine: Path) -> None:
    """Its free space says nothing, as with a quota: ENOSPC comes in the middle."""
    start = Start(*mounted(small(machine / "volume")), TEST_ROOMY=1).go()
    said = start.end()
    assert right(said["path"])
    assert said["path"].startswith(f"{machine}/disk/")
    assert said["left"] == []
    assert "No space left" in start.log


def test_a_full_disk_is_a_clear_error(hub: Hub, machine: Path) -> None:
    inside = mounted(small(machine / "volume"), small(machine / "disk"))
    said = Start(*inside, TEST_ROOMY=1).go().end()
    assert said["code"] == "no_space"
    assert said["again"]["code"] == "unreachable", "nothing that was left may pass for whole"
    assert said["left"] == []


def test_files_that_can_not_be_written_whole(hub: Hub) -> None:
    """The same without mounts: the system refuses to let a file grow beyond 60 kB (EFBIG)."""
    said = Start(TEST_LIMIT=60_000).go().end()
    assert said["code"] == "no_space"
    assert said["again"]["code"] == "unreachable"
    assert said["left"] == []
    assert right(Start().go().end()["path"])
