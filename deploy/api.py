"""RunPod's REST API, version 2: a typed client. https://docs.runpod.io/api-reference-v2"""

from __future__ import annotations

import json
import os
import re
import signal
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any, Literal

import httpx
from pydantic import BaseModel, ConfigDict, field_validator
from pydantic.alias_generators import to_camel

Body = dict[str, Any]
BASE_URL = "https://api.runpod.io"
# A window that is used up for longer than this ends the command: nobody waits for an hour.
LONGEST_WAIT = 120.0
ATTEMPTS = 6
_WINDOW = re.compile(r'"(\w+)";r=(\d+);t=(\d+)')


class Answer(BaseModel):
    """What the API answers, in Python's names. Fields that this client does not use are dropped."""

    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, frozen=True)


class Endpoint(Answer):
    """timeout: milliseconds. workers, scaling, gpu: as the API has them."""

    id: str
    name: str
    type: Literal["QUEUE", "LOAD_BALANCER"]
    request_urls: dict[str, str]
    image: str = ""
    args: str = ""
    disk: int = 0
    ports: list[str] = []
    env: dict[str, str] = {}
    registry: str | None = None
    gpu: dict[str, Any] | None = None
    cpu: list[dict[str, Any]] | None = None
    workers: dict[str, int]
    scaling: dict[str, Any]
    data_center_ids: list[str]
    network_volumes: list[str]
    timeout: int
    flashboot: str
    created_at: str

    @field_validator("name")
    @classmethod
    def _without_mark(cls, value: str) -> str:
        """The console marks an endpoint with FlashBoot in its name."""
        return value.removesuffix(" -fb")


class Worker(Answer):
    id: str
    status: Literal["RUNNING", "IDLE", "INITIALIZING", "THROTTLED", "UNHEALTHY"]
    is_stale: bool
    version: int | None = None
    image: str | None = None
    uptime_seconds: int | None = None
    gpu_type_id: str | None = None
    data_center_id: str | None = None


class Workers(Answer):
    workers: list[Worker]
    endpoint_version: int | None = None


class Release(Answer):
    version: int | None = None
    created_at: str
    worker_count: int
    diff: list[dict[str, Any]]


class Template(Answer):
    id: str
    name: str
    env: dict[str, str]


class Gpu(Answer):
    """price: dollars an hour, by product."""

    id: str
    pool: str | None
    memory: int
    price: dict[str, float]
    availability: str | None = None


class LogLine(Answer):
    source: str
    line: str
    ts: str


class ApiError(Exception):
    """The API refused a request, or cannot be reached; the message is one sentence."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class Unanswered(ApiError):
    """A request that makes something had no answer: whether it was carried out is not known."""


class Api:
    """One account of RunPod. key: RUNPOD_API_KEY. back_off: seconds before a second attempt, then doubled.

    http: the client below, which has the key.
    """

    def __init__(
        self, key: str, *, back_off: float = 1.0, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self._key, self._back_off, self._sleep = key, back_off, sleep
        self._not_before = 0.0
        # The GraphQL API refuses clients whose name is not a browser's.
        headers = {"Authorization": f"Bearer {key}", "User-Agent": "Mozilla/5.0 (runpod-workers deploy)"}
        base = os.environ.get("RUNPOD_API_BASE_URL", BASE_URL)
        self.http = httpx.Client(base_url=base, headers=headers, timeout=30, verify=_certificates())

    # ---- endpoints -------------------------------------------------------------------------------------

    def endpoints(self) -> list[Endpoint]:
        return [Endpoint.model_validate(item) for item in self.send("GET", "/v2/serverless")["endpoints"]]

    def endpoint(self, name: str) -> Endpoint:
        """The endpoint with the id `name`."""
        return Endpoint.model_validate(self.send("GET", f"/v2/serverless/{name}"))

    def create(self, body: Body) -> Endpoint:
        """Raises Unanswered when there may be a new endpoint nevertheless."""
        return Endpoint.model_validate(self.send("POST", "/v2/serverless", body))

    def update(self, endpoint: str, body: Body) -> Endpoint:
        return Endpoint.model_validate(self.send("PATCH", f"/v2/serverless/{endpoint}", body))

    def delete(self, path: str) -> None:
        """Delete /v2/`path`; nothing happens when there is no such thing."""
        try:
            self.send("DELETE", f"/v2/{path}")
        except ApiError as error:
            if error.status != 404:
                raise

    def workers(self, endpoint: str) -> Workers:
        return Workers.model_validate(self.send("GET", f"/v2/serverless/{endpoint}/workers"))

    def releases(self, endpoint: str) -> list[Release]:
        answer = self.send("GET", f"/v2/serverless/{endpoint}/releases")
        return [Release.model_validate(item) for item in answer["releases"]]

    # ---- templates, catalogue ----------------------------------------------------------------------------

    def template(self, name: str) -> Template | None:
        templates = (Template.model_validate(item) for item in self.send("GET", "/v2/templates")["templates"])
        return next((template for template in templates if template.name == name), None)

    def gpus(self) -> list[Gpu]:
        path = "/v2/catalog/gpus?include=AVAILABILITY&product=SERVERLESS"
        return [Gpu.model_validate(item) for item in self.send("GET", path)["gpus"]]

    # ---- logs ----------------------------------------------------------------------------------------------

    def logs(
        self, endpoint: str, worker: str, *, tail: int = 100, silence: float | None = None
    ) -> Iterator[LogLine]:
        """The log of a worker, its last `tail` lines first.

        silence: seconds without a line after which it ends; None: it follows until the worker is gone.
        """
        path, cursor = f"/v2/serverless/{endpoint}/workers/{worker}/logs", ""
        seen: tuple[str, str] | None = None
        failures = 0
        while True:
            headers = {"Last-Event-ID": cursor} if cursor else {}
            timeout = httpx.Timeout(30, read=silence or 60)
            try:
                with self.http.stream(
                    "GET", path, params={"tail": tail}, headers=headers, timeout=timeout
                ) as answer:
                    if answer.status_code != 200:
                        answer.read()
                        problem = self._problem(answer)
                        passing = answer.status_code == 429 or answer.status_code >= 500
                        raise httpx.TransportError(str(problem)) if passing else problem
                    for text in answer.iter_lines():
                        if text.startswith("data:"):
                            line = LogLine.model_validate(json.loads(text.removeprefix("data:")))
                            if (line.ts, line.line) != seen:
                                seen, cursor, failures = (line.ts, line.line), line.ts, 0
                                yield line
            except httpx.ReadTimeout:
                pass
            except httpx.TransportError as error:  # resumed where it broke off
                failures += 1
                if failures == ATTEMPTS:
                    raise ApiError(f"The log of {worker} broke off: {error}.") from None
            if silence is not None:
                return
            self._sleep(self._back_off * 2**failures)

    # ---- transport -----------------------------------------------------------------------------------------

    def send(self, method: str, path: str, body: Body | None = None, *, makes: bool | None = None) -> Any:
        """The JSON of an answer. A request that was not carried out, or may be twice, is sent again.

        makes: whether it makes something, as a POST does: a 5xx or a broken connection raises Unanswered.
        Raises ApiError.
        """
        makes = method == "POST" if makes is None else makes
        for attempt in range(ATTEMPTS):
            last = attempt == ATTEMPTS - 1
            self._sleep(max(0.0, self._not_before - time.monotonic()))
            try:
                with nullcontext() if method == "GET" else _answered_first():
                    answer = self.http.request(method, path, json=body)
            except httpx.TransportError as error:
                sent = not isinstance(error, httpx.ConnectError | httpx.ConnectTimeout)
                if sent and makes:
                    raise Unanswered(f"RunPod did not answer {method} {path.partition('?')[0]}.") from None
                if last:
                    raise ApiError(f"RunPod cannot be reached at {self.http.base_url}: {error}.") from None
                self._sleep(self._back_off * 2**attempt)
                continue
            wait = self._limit(answer)
            if answer.is_success:
                return answer.json() if answer.content else None
            if answer.status_code >= 500 and makes:
                raise Unanswered(str(self._problem(answer)), answer.status_code)
            if last or not (answer.status_code == 429 or answer.status_code >= 500) or wait > LONGEST_WAIT:
                raise self._problem(answer)
            self._sleep(wait or self._back_off * 2**attempt)
        raise AssertionError("unreachable")

    def _limit(self, answer: httpx.Response) -> float:
        """Seconds that this answer asks to wait; a used-up window also holds back the next request."""
        windows = _WINDOW.findall(answer.headers.get("RateLimit", ""))
        wait = max((float(seconds) for _, left, seconds in windows if left == "0"), default=0.0)
        if answer.is_success:
            self._not_before = time.monotonic() + min(wait, LONGEST_WAIT)
        asked = answer.headers.get("Retry-After", "")
        return float(asked) if asked.isdecimal() else wait

    def _problem(self, answer: httpx.Response) -> ApiError:
        """RFC 9457's problem document in one sentence, without the key."""
        try:
            problem = answer.json()
            detail = str(problem.get("detail") or problem.get("title") or "no reason given")
            detail = "; ".join([detail.rstrip("."), *map(str, problem.get("errors") or [])])
        except (ValueError, AttributeError):
            detail = answer.reason_phrase or "no reason given"
        what = {
            401: "RunPod does not accept RUNPOD_API_KEY",
            403: "RUNPOD_API_KEY may not do this",
            429: "RunPod's rate limit is used up",
        }.get(answer.status_code, f"RunPod refused {answer.request.method} {answer.request.url.path}")
        message = f"{what}: {detail} ({answer.status_code}).".replace(self._key, "***")
        return ApiError(" ".join(message.split()), answer.status_code)


@cache
def _certificates() -> ssl.SSLContext:
    return httpx.create_ssl_context()  # a tenth of a second


@contextmanager
def _answered_first() -> Iterator[None]:
    """Ctrl-C takes effect after the block: what is in flight would be carried out behind the next deploy."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pressed: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda number, _: pressed.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if pressed:
            raise KeyboardInterrupt
