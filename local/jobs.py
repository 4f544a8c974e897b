"""A job on the platform: how a request becomes one, its states, and the limits that RunPod sets."""

from __future__ import annotations

import json
import uuid
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

MIB = 1 << 20


@dataclass(frozen=True)
class Rules:
    """The platform's limits and intervals, in seconds and bytes, with RunPod's own values as defaults.

    Those marked "observed" are not documented: people report them of the live platform.
    """

    run_bytes: int = 10 * MIB
    """Largest body of a /run, and largest result of such a job."""
    runsync_bytes: int = 20 * MIB
    """The same for /runsync and the OpenAI routes."""
    chunk_bytes: int = MIB
    """Largest chunk of a stream; larger ones are split."""
    execution_timeout: float = 600.0
    execution_timeout_range: tuple[float, float] = (5.0, 7 * 86400.0)
    ttl: float = 86400.0
    """A job's time to live, in the queue and running; after it the job is removed without a trace."""
    ttl_range: tuple[float, float] = (10.0, 7 * 86400.0)
    run_retention: float = 1800.0
    runsync_retention: float = 60.0
    wait: float = 90.0
    """How long a /runsync waits before it answers with the job's state."""
    wait_range: tuple[float, float] = (1.0, 300.0)
    edge_timeout: float = 100.0
    """Time to the first byte of an OpenAI route, then 524 (observed)."""
    retries: int = 1
    """How often a job whose lease expired is run again before it fails (observed)."""
    ping_interval: float = 10.0
    """Whole seconds: the SDK drops the rest."""
    missed_pings: int = 4
    """A lease expires when the worker's pings have not named the job for so many intervals (observed)."""
    queue_per_worker: int = 500
    """A queue longer than 50 and than so many jobs a worker takes no more."""
    webhook_retries: int = 2
    webhook_delay: float = 10.0
    poll_timeout: float = 30.0
    """Long poll: how long a worker's request for jobs or stop signals stays open."""
    restarts: int = 3
    """How often in a row a worker is started again that ended without having taken a job."""
    restart_delay: float = 1.0
    """Pause before the first of these, doubled for each further one."""
    grace: float = 30.0
    """From SIGTERM to SIGKILL."""
    worker_wait: float = 120.0
    """Load balancer: how long a request waits for a worker that is ready."""
    request_timeout: float = 330.0
    """Load balancer: the longest request."""
    http_bytes: int = 30 * MIB
    """Load balancer: the largest body of a request and of an answer."""

    def __post_init__(self) -> None:
        if self.ping_interval < 1 or self.ping_interval % 1:
            raise ValueError("ping_interval must be whole seconds, at least 1")


class State(StrEnum):
    IN_QUEUE = "IN_QUEUE"
    IN_PROGRESS = "IN_PROGRESS"
    COMPLETED = "COMPLETED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"
    TIMED_OUT = "TIMED_OUT"

    @property
    def final(self) -> bool:
        return self not in (State.IN_QUEUE, State.IN_PROGRESS)


class Refused(Exception):
    """A request that is refused; `status` is the HTTP status."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


@dataclass(eq=False)
class Job:
    """A job, and the lease of the worker that runs it. Times are seconds on the queue's clock.

    payload: what the worker receives. sync: came by /runsync, so that its result is kept for the shorter
    time. started: when its worker took it. last_ping: when a ping last named it. result: `output` and
    `error`, as far as there are any. chunks: streamed and not yet read. listeners: called once, at
    the next change.
    """

    id: str
    payload: dict[str, Any]
    sync: bool
    created: float
    execution_timeout: float
    ttl: float
    state: State = State.IN_QUEUE
    worker: str | None = None
    started: float = 0.0
    last_ping: float = 0.0
    ended: float = 0.0
    retries: int = 0
    result: dict[str, Any] = field(default_factory=dict)
    chunks: deque[Any] = field(default_factory=deque)
    listeners: list[Callable[[], None]] = field(default_factory=list)

    def describe(self) -> dict[str, Any]:
        """The job as /status shows it; times in milliseconds."""
        body: dict[str, Any] = {"id": self.id, "status": self.state.value}
        if self.worker is not None:
            body |= {"delayTime": round(1000 * (self.started - self.created)), "workerId": self.worker}
            if self.state.final:
                body["executionTime"] = round(1000 * (self.ended - self.started))
        if self.retries:
            body["retries"] = self.retries
        return body | self.result

    def changed(self) -> None:
        """Call the listeners."""
        listeners, self.listeners = self.listeners, []
        for listener in listeners:
            listener()


def read_job(body: Any, rules: Rules, *, sync: bool, created: float) -> Job:
    """The job of a request body `{"input": ..., "policy": ..., "webhook": ..., "s3Config": ...}`.

    `policy.lowPriority` is accepted and ignored: it only concerns scaling. Raises Refused.
    """
    if not isinstance(body, dict) or "input" not in body:
        raise Refused('the body must be a JSON object with the key "input"')
    policy, webhook = body.get("policy") or {}, body.get("webhook")
    if not isinstance(policy, dict):
        raise Refused("policy must be an object")
    if webhook and not (isinstance(webhook, str) and webhook.startswith(("http://", "https://"))):
        raise Refused("webhook must be an http(s) URL")
    timeout = _seconds(policy, "executionTimeout", rules.execution_timeout, rules.execution_timeout_range)
    ttl = _seconds(policy, "ttl", rules.ttl, rules.ttl_range)
    name = f"{'sync-' if sync else ''}{uuid.uuid4()}-u1"
    # An empty input never arrives on RunPod either: the SDK of a worker that takes single jobs drops such a
    # job, and it fails after its retries (observed).
    payload = {key: body[key] for key in ("input", "webhook", "s3Config") if body.get(key)}
    return Job(name, {"id": name} | payload, sync, created, timeout, ttl)


def _seconds(policy: dict[str, Any], key: str, default: float, allowed: tuple[float, float]) -> float:
    """A time of the policy, which is in milliseconds; 0 and null mean the default. Raises Refused.

    That a time out of bounds is refused, not clamped, is an assumption.
    """
    value = policy.get(key)
    if not value:
        return default
    low, high = allowed
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value / 1000 <= high:
        raise Refused(f"policy.{key} must be milliseconds from {low * 1000:.0f} to {high * 1000:.0f}")
    return value / 1000


def split_chunk(chunk: Any, limit: int) -> list[Any]:
    """`chunk` in parts of up to `limit` bytes: text between characters, anything else as JSON."""
    text = chunk if isinstance(chunk, str) else json.dumps(chunk, ensure_ascii=False)
    data = text.encode("utf-8", "replace")
    if len(data) <= limit:
        return [chunk]
    parts = []
    start = 0
    while start < len(data):
        end = min(start + limit, len(data))
        while end < len(data) and data[end] & 0xC0 == 0x80:
            end -= 1
        parts.append(data[start:end].decode())
        start = end
    return parts
