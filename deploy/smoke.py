"""A worker's test_input.json through an endpoint: a job of a queue, or a request of a load balancer."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import httpx

from deploy.api import Endpoint

# RunPod's own bound for a request of a load balancer, and a little more.
_LONGEST_REQUEST = 340
_NO_WORKER = ("timed out waiting for worker", "no workers available")


class SmokeFailed(Exception):
    """The endpoint answered, and the answer is a failure."""


class Smoke:
    """One test of `endpoint`, in steps. ping: seconds that /ping may take.

    state: one word or two for the progress display.
    """

    def __init__(self, http: httpx.Client, endpoint: Endpoint, test_input: Any, ping: float) -> None:
        self._http, self._urls = http, endpoint.request_urls
        self._test_input, self._ping = test_input, ping
        self._job: str | None = None
        self.state = ""

    def step(self) -> Any:
        """The answer, or None as long as there is none. Raises SmokeFailed."""
        try:
            return self._step_http() if "base" in self._urls else self._step_queue()
        except httpx.TransportError as error:
            self.state = f"no answer ({type(error).__name__})"
            return None

    def stop(self) -> None:
        """Cancel a job that has not ended: it would start workers, which are billed."""
        if self._job is not None:
            with suppress(httpx.HTTPError):
                self._http.post(self._urls["cancel"].replace("{job_id}", self._job), timeout=5)

    def _step_queue(self) -> Any:
        if self._job is None:
            answer = self._json(self._http.post(self._urls["run"], json=self._test_input))
            self._job = answer.get("id")
            self.state = "job sent" if self._job else "job not taken"
            return None
        answer = self._json(self._http.get(self._urls["status"].replace("{job_id}", self._job)))
        status = answer.get("status", "")
        self.state = f"job {status.lower().replace('_', ' ')}"
        if status in ("FAILED", "CANCELLED", "TIMED_OUT"):
            self._job = None
            raise SmokeFailed(f"The job of test_input.json is {status}: {_reason(answer.get('error'))}")
        if status != "COMPLETED":
            return None
        self._job = None
        return answer.get("output")

    def _step_http(self) -> Any:
        ping = self._http.get(self._urls["health"], timeout=self._ping)
        self.state = f"/ping {ping.status_code}"
        if ping.status_code != 200:
            return None
        url = f"{self._urls['base']}/runsync"
        answer = self._http.post(url, json=self._test_input, timeout=_LONGEST_REQUEST)
        if answer.status_code in (429, 502, 504) or any(text in answer.text for text in _NO_WORKER):
            self.state = f"/runsync {answer.status_code}"
            return None
        if answer.status_code != 200:
            raise SmokeFailed(f"POST /runsync answered {answer.status_code}: {_reason(answer.text)}")
        return self._json(answer).get("output")

    def _json(self, answer: httpx.Response) -> dict[str, Any]:
        """Raises SmokeFailed for a key that the endpoint does not take."""
        if answer.status_code in (401, 403):
            raise SmokeFailed(f"RUNPOD_API_KEY may not call this endpoint ({answer.status_code}).")
        try:
            return dict(answer.json()) if answer.is_success else {}
        except ValueError:
            return {}


def _reason(error: Any) -> str:
    """The message in a worker's error: JSON in a text, OpenAI's object, or a plain text."""
    with suppress(ValueError, TypeError):
        error = json.loads(error)
    if isinstance(error, dict):
        error = error.get("error", error)
    if isinstance(error, dict) and "message" in error:
        return " ".join(str(error[key]) for key in ("message", "code") if error.get(key))
    return str(error)[:500]
