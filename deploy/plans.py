"""What a deploy would do, and its steps: each can be repeated, and two deploys may meet."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from deploy import cached_model
from deploy.api import Api, Body, Endpoint, Unanswered
from deploy.bodies import Change, actual, changes, creation, patch, recreated, wanted
from deploy.config import ConfigError, load_config
from deploy.history import History
from tools.workers import load_module

TYPES = {"queue": "QUEUE", "http": "LOAD_BALANCER"}


class Conflict(Exception):
    """Two endpoints of one name, or another deploy at the same time."""


@dataclass(frozen=True)
class Order:
    """What the command line says. None: as the endpoint has it, or deploy.toml."""

    worker: str
    name: str
    type: str | None = None
    model: str | None = None
    tag: str | None = None
    config: Path | None = None


@dataclass(frozen=True)
class Plan:
    """endpoint, old: what there is. new: what there shall be."""

    endpoint: Endpoint | None
    old: Body | None
    new: Body
    history: History

    @property
    def reason(self) -> str | None:
        """Why the endpoint has to be made anew."""
        return recreated(self.old, self.new) if self.old else None

    @property
    def action(self) -> Literal["create", "recreate", "update", "none"]:
        if self.old is None:
            return "create"
        return "recreate" if self.reason else "update" if self.changes else "none"

    @property
    def changes(self) -> list[Change]:
        return changes(self.old or {}, self.new)


def find(api: Api, name: str) -> Endpoint | None:
    """The endpoint called `name`. Raises Conflict when there are two."""
    same = named(api, name)
    if len(same) > 1:
        ids = " and ".join(endpoint.id for endpoint in same)
        raise Conflict(f"There are {len(same)} endpoints named {name}: {ids}. Delete or rename one of them.")
    return same[0] if same else None


def named(api: Api, name: str) -> list[Endpoint]:
    """Oldest first. The order is the same for everybody."""
    same = [endpoint for endpoint in api.endpoints() if endpoint.name == name]
    return sorted(same, key=lambda endpoint: (endpoint.created_at, endpoint.id))


def make_plan(api: Api, order: Order) -> Plan:
    """Raises ConfigError, Conflict, ApiError."""
    config = load_config(order.worker, order.config)
    endpoint = find(api, order.name)
    type_ = TYPES[order.type or config.type] if order.type or not endpoint else endpoint.type
    kept = endpoint.env.get("MODEL_NAME") if endpoint else None
    model = order.model or config.env.get("MODEL_NAME") or kept
    new = wanted(config, name=order.name, image=_image(order, endpoint), type=type_, model=model)
    for variable in config.required:
        if variable not in new["env"]:
            raise ConfigError(
                f"{variable} is not set, and {order.worker} does not start without it: "
                "set it in [env] of its deploy.toml."
            )
    if config.cached_model:
        new["cachedModels"] = [_reference(order.worker, new["env"])]
    history = History(api, order.name)
    return Plan(endpoint, actual(endpoint, history.models) if endpoint else None, new, history)


def rollback_plan(api: Api, endpoint: Endpoint) -> Plan | None:
    """The plan that puts the earlier release back; None when none is kept."""
    history = History(api, endpoint.name)
    old = actual(endpoint, history.models)
    earlier = history.earlier(old)
    return Plan(endpoint, old, earlier, history) if earlier else None


def apply(api: Api, plan: Plan, back_off: float) -> Endpoint:
    """Make the endpoint what it shall be. Raises ApiError, Conflict."""
    if plan.endpoint and plan.action == "none":
        return plan.endpoint
    plan.history.record(plan.old, plan.new)
    if plan.endpoint and plan.old and plan.action == "update":
        return _update(api, plan.endpoint.id, plan.old, plan.new)
    if plan.endpoint:
        api.delete(f"serverless/{plan.endpoint.id}")
    return _create(api, plan.new, back_off)


def restore(api: Api, plan: Plan, endpoint: Endpoint, back_off: float) -> str:
    """Undo `apply` after a failure, and say what there is now. Raises ApiError, Conflict."""
    check_unchanged(api, endpoint)
    if plan.action == "none":
        return "Nothing was changed, so nothing was put back."
    if plan.old is None:
        api.update(endpoint.id, {"workers": {**plan.new["workers"], "min": 0, "max": 0}})
        return "There is no earlier release: the endpoint is stopped, with no workers, and costs nothing."
    plan.history.record(None, plan.old)
    if plan.action == "recreate":
        api.delete(f"serverless/{endpoint.id}")
        return f"The earlier release is back, as a new endpoint, {_create(api, plan.old, back_off).id}."
    _update(api, endpoint.id, plan.new, plan.old)
    return "The earlier release is back."


def check_unchanged(api: Api, endpoint: Endpoint) -> None:
    """Raises Conflict when the endpoint is no longer what `apply` gave."""
    if differ := changes(actual(endpoint, []), actual(api.endpoint(endpoint.id), [])):
        raise Conflict(f"Another deploy changed {endpoint.name} meanwhile, and it stays so: {differ[0]}.")


def check_alone(api: Api, endpoint: Endpoint) -> None:
    """RunPod has no lock: of two endpoints of one name, whoever made the later one deletes it.

    Raises Conflict after it has deleted `endpoint`.
    """
    same = named(api, endpoint.name)
    if len(same) > 1 and same[0].id != endpoint.id:
        api.delete(f"serverless/{endpoint.id}")
        raise Conflict(
            f"Another deploy made {endpoint.name} at the same time, as {same[0].id}. "
            f"This one removed its own endpoint, {endpoint.id}. Deploy again to apply what differs."
        )


def _update(api: Api, name: str, old: Body, new: Body) -> Endpoint:
    if old["cachedModels"] or new["cachedModels"]:
        return cached_model.save(api, new, name)
    body = patch(old, new)
    return api.update(name, body) if body else api.endpoint(name)


def _create(api: Api, body: Body, back_off: float) -> Endpoint:
    """A create whose answer is lost may have made an endpoint: look for it before the next attempt."""
    for attempt in range(3):
        try:
            endpoint = cached_model.save(api, body) if body["cachedModels"] else api.create(creation(body))
            check_alone(api, endpoint)
            return endpoint
        except Unanswered:
            for look in range(3):
                time.sleep(back_off * 2**look)
                if same := named(api, body["name"]):
                    return _update(api, same[0].id, actual(same[0], body["cachedModels"]), body)
            if attempt == 2:
                raise
    raise AssertionError("unreachable")


def _image(order: Order, endpoint: Endpoint | None) -> str:
    """Raises ConfigError when it is not known which image to deploy."""
    if not order.tag:
        if endpoint:
            return endpoint.image
        raise ConfigError("TAG is not set: it names the release of the image to deploy, as in TAG=1.4.2.")
    registry = os.environ.get("REGISTRY")
    if not registry and endpoint:
        registry = endpoint.image.rpartition("/")[0]
    if not registry:
        raise ConfigError("REGISTRY is not set: it names where the image was pushed to, as in docker.io/me.")
    return f"{registry}/worker-{order.worker}:{order.tag}"


def _reference(worker: str, env: dict[str, str]) -> str:
    model = (
        env.get("MODEL_NAME") or load_module(worker, "schemas").Settings.model_fields["model_name"].default
    )
    try:
        return cached_model.reference(str(model), env.get("MODEL_REVISION"))
    except ValueError as error:
        raise ConfigError(f"{error}.") from None
