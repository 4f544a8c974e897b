"""The commands: plan, deploy, rollback, status, logs, destroy. Each gives a result for --json."""

from __future__ import annotations

import queue
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from deploy import plans
from deploy.api import Api, ApiError, Endpoint, LogLine
from deploy.examples import test_input, usage
from deploy.history import History
from deploy.plans import Order, Plan
from deploy.prices import Prices
from deploy.rollout import Pace, Rollout, RolloutFailed
from deploy.smoke import Smoke

Result = dict[str, Any]


class Declined(Exception):
    """The question was answered with no, or nobody was there to answer."""


class Missing(Exception):
    """There is no such endpoint, or no earlier release of it."""


class Failed(Exception):
    """The deploy failed; what is there now is in `result`."""

    def __init__(self, message: str, result: Result) -> None:
        super().__init__(message)
        self.result = result


@dataclass(frozen=True)
class Session:
    """What all commands need. say: progress, a line at a time. yes: no questions."""

    api: Api
    order: Order
    pace: Pace
    say: Callable[[str], None]
    yes: bool


def plan(session: Session) -> Result:
    """Show what a deploy would change; change nothing."""
    result = _plan(session, plans.make_plan(session.api, session.order))
    session.say(_line(result["price_per_hour"]))
    return result


def deploy(session: Session) -> Result:
    """Make or change the endpoint, wait for a worker, send it test_input.json."""
    return _carry_out(session, plans.make_plan(session.api, session.order))


def rollback(session: Session) -> Result:
    """Put the earlier release back, wait for a worker, send it test_input.json."""
    proposed = plans.rollback_plan(session.api, _endpoint(session))
    if proposed is None:
        raise Missing(f"No earlier release of {session.order.name} is kept.")
    return _carry_out(session, proposed)


def status(session: Session) -> Result:
    """Workers, releases and price of the endpoint."""
    endpoint = _endpoint(session)
    seen, releases = session.api.workers(endpoint.id), session.api.releases(endpoint.id)
    workers = [worker.model_dump() for worker in seen.workers]
    session.say(f"{endpoint.name}  {endpoint.id}  {endpoint.type}  {endpoint.image}")
    for worker in seen.workers:
        place = f"{worker.gpu_type_id or 'no machine yet'}  {worker.data_center_id or ''}"
        stale = "  (earlier release)" if worker.is_stale else ""
        session.say(f"  {worker.id}  {worker.status}  {worker.uptime_seconds or 0} s  {place}{stale}")
    if not seen.workers:
        session.say("  no worker runs")
    for release in releases[:5]:
        fields = ", ".join(str(entry["field"]) for entry in release.diff) or "created"
        session.say(f"  release {release.version}  {release.created_at}  {fields}")
    return {
        "endpoint": _summary(endpoint),
        "workers": workers,
        "releases": [release.model_dump() for release in releases],
        "price_per_hour": Prices(session.api.gpus()).per_hour(endpoint.gpu or {}, endpoint.workers),
    }


def logs(session: Session, print_line: Callable[[str, LogLine], None]) -> None:
    """Follow the logs of all workers, those that start meanwhile too, until it is interrupted."""
    endpoint = _endpoint(session)
    lines: queue.Queue[tuple[str, LogLine]] = queue.Queue()
    followed: set[str] = set()
    looked = float("-inf")

    def follow(worker: str) -> None:
        with suppress(ApiError):  # the worker is gone
            for line in session.api.logs(endpoint.id, worker):
                lines.put((worker, line))

    while True:
        if time.monotonic() - looked > session.pace.poll:
            looked = time.monotonic()
            workers = {worker.id for worker in session.api.workers(endpoint.id).workers}
            if not workers and not followed:
                session.say("No worker runs yet.")
            for worker in workers - followed:
                threading.Thread(target=follow, args=(worker,), daemon=True).start()
            followed |= workers
        with suppress(queue.Empty):
            print_line(*lines.get(timeout=session.pace.poll))


def destroy(session: Session) -> Result:
    """Delete the endpoint, its queued jobs and the record of its releases."""
    endpoint = _endpoint(session)
    _confirm(session, f"Delete {endpoint.name} ({endpoint.id}), its workers and its queued jobs?")
    session.api.delete(f"serverless/{endpoint.id}")
    History(session.api, endpoint.name).delete()
    session.say(f"{endpoint.name} ({endpoint.id}) is deleted.")
    return {"deleted": endpoint.id}


def _carry_out(session: Session, proposed: Plan) -> Result:
    result = _plan(session, proposed)
    if proposed.action == "recreate":
        what = f"{proposed.reason}. Delete it, with its address and queued jobs, and make another?"
        _confirm(session, what)
    endpoint = plans.apply(session.api, proposed, session.pace.back_off)
    smoke = Smoke(session.api.http, endpoint, test_input(session.order.worker), session.pace.ping)
    try:
        output = Rollout(session.api, endpoint, smoke, session.pace, session.say).wait()
    except RolloutFailed as error:
        for line in error.log:
            session.say(f"  | {line}")
        try:
            outcome = plans.restore(session.api, proposed, endpoint, session.pace.back_off)
        except ApiError as problem:
            outcome = f"The earlier release is not back: {problem}"
        details = {"cause": error.cause, "log": error.log, "endpoint": _summary(endpoint)}
        raise Failed(f"{error} {outcome}", {**result, **details}) from None
    plans.check_unchanged(session.api, endpoint)
    plans.check_alone(session.api, endpoint)
    plans.find(session.api, endpoint.name)
    text = usage(session.order.worker, endpoint)
    session.say(f"\n{endpoint.name} answers. {text}\n{_line(result['price_per_hour'])}")
    return {**result, "endpoint": _summary(endpoint), "output": output}


def _plan(session: Session, proposed: Plan) -> Result:
    name = proposed.new["name"]
    verb = {
        "create": "will be made",
        "recreate": "will be deleted and made anew",
        "update": "will be changed",
    }
    which = proposed.endpoint.id if proposed.endpoint else "new"
    session.say(f"{name} ({which}) {verb.get(proposed.action, 'is as it should be')}.")
    for change in proposed.changes:
        session.say(f"  {change}")
    prices = Prices(session.api.gpus())
    prices.check(proposed.new["gpu"]["pools"])
    price = prices.per_hour(proposed.new["gpu"], proposed.new["workers"])
    return {
        "action": proposed.action,
        "changes": [str(change) for change in proposed.changes],
        "price_per_hour": price,
    }


def _line(price: Result) -> str:
    """The price for the eye."""
    pools = ", ".join(f"{pool} ${cost:.2f}" for pool, cost in price["worker"].items())
    least, most = price["min"], price["max"]
    return f"A worker costs an hour: {pools}. At least ${least:.2f}, at most ${most:.2f} an hour in all."


def _summary(endpoint: Endpoint) -> Result:
    return endpoint.model_dump(include={"id", "name", "type", "image", "request_urls", "workers"})


def _endpoint(session: Session) -> Endpoint:
    endpoint = plans.find(session.api, session.order.name)
    if endpoint is None:
        raise Missing(f"There is no endpoint named {session.order.name}.")
    return endpoint


def _confirm(session: Session, question: str) -> None:
    """Raises Declined. Without a terminal, only --yes is an answer."""
    if session.yes:
        return
    if not sys.stdin.isatty():
        raise Declined(f"{question} Nobody is there to answer: YES=1 does.")
    print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise Declined("Nothing was changed.")
