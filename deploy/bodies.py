"""What an endpoint should be, what it is, and what a PATCH has to say to make the one the other."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from deploy.api import Body, Endpoint
from deploy.config import Config

PORT = "8000"
_FLASHBOOT = {"off": "OFF", "on": "FLASHBOOT", "priority": "PRIORITY_FLASHBOOT"}
_NO_PATCH = ("type", "cachedModels")
_SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|KEY", re.IGNORECASE)


@dataclass(frozen=True)
class Change:
    """field: dotted, as in workers.max. old: None where the field is new; new: None where it goes."""

    field: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.field}: {_show(self.field, self.old)} -> {_show(self.field, self.new)}"


def wanted(config: Config, *, name: str, image: str, type: str, model: str | None) -> Body:
    """The body of a create: every field, so that each can be compared, and `cachedModels`, which REST lacks.

    type: QUEUE or LOAD_BALANCER.
    """
    http = type == "LOAD_BALANCER"
    env = dict(config.env)
    env |= {variable: f"{{{{ RUNPOD_SECRET_{secret} }}}}" for variable, secret in config.secrets.items()}
    if model:
        env["MODEL_NAME"] = model
    if http:  # all three, or a worker never counts as ready
        env = {"SERVE_MODE": "http", "PORT": PORT, "PORT_HEALTH": PORT, **env}
    by_count = http or config.scaler == "request_count"
    workers = {"min": config.workers_min, "max": config.workers_max}
    if http or not by_count:  # refused for a queue that scales by requests
        workers["idleTimeout"] = config.idle_timeout
    return {
        "name": name,
        "type": type,
        "image": image,
        "args": "",
        "disk": config.disk_gb,
        "ports": [f"{PORT}/http"] if http else [],
        "env": env,
        "registry": config.registry,
        "gpu": {
            "pools": config.pools,
            "excludedTypes": sorted(config.excluded_types),
            "count": config.gpu_count,
            "minCudaVersion": config.cuda,
            "allowedCudaVersions": [],
        },
        "workers": workers,
        "scaling": {"type": "REQUEST_COUNT", "requestCount": config.request_count}
        if by_count
        else {"type": "QUEUE_DELAY", "queueDelay": config.queue_delay},
        "dataCenterIds": sorted(config.data_centers),
        "networkVolumes": sorted(config.volumes),
        "timeout": 1000 * config.execution_timeout,
        "flashboot": _FLASHBOOT[config.flashboot],
        "cachedModels": [],
    }


def actual(endpoint: Endpoint, models: list[str]) -> Body:
    """The same for an endpoint that is there, with these cached `models`."""
    body = endpoint.model_dump(by_alias=True, exclude={"id", "request_urls", "created_at"})
    for field in ("dataCenterIds", "networkVolumes"):
        body[field] = sorted(body[field])
    if endpoint.gpu is not None:
        defaults = {"excludedTypes": [], "count": 1, "minCudaVersion": None, "allowedCudaVersions": []}
        body["gpu"] = {**defaults, **endpoint.gpu}
        body["gpu"]["excludedTypes"] = sorted(body["gpu"]["excludedTypes"] or [])
    body["cachedModels"] = models
    return {key: value for key, value in body.items() if value is not None or key == "registry"}


def changes(old: Body, new: Body) -> list[Change]:
    """The fields that differ; those of objects one by one."""
    return list(_changes(old, new, ""))


def patch(old: Body, new: Body) -> Body:
    """The body of a PATCH that makes `old` `new`: only the fields that differ.

    env replaces all variables, so all are in it. Pools and exclusions are one selection: sent together, or
    not at all.
    """
    body = {key: value for key, value in new.items() if old.get(key) != value and key not in _NO_PATCH}
    if "gpu" in body:
        body["gpu"] = _gpu_patch(old["gpu"], new["gpu"])
    return body


def recreated(old: Body, new: Body) -> str | None:
    """Why `old` cannot become `new`; None when a PATCH does it."""
    if old["type"] != new["type"]:
        return f"RunPod cannot change its type from {old['type']} to {new['type']}"
    if "gpu" not in old:
        return "RunPod cannot give a CPU endpoint GPUs"
    return None


def creation(body: Body) -> Body:
    """`body` as a create takes it: without a CUDA floor that is not set, and what only GraphQL takes."""
    gpu = {name: value for name, value in body["gpu"].items() if value}
    return {key: value for key, value in {**body, "gpu": gpu}.items() if key != "cachedModels"}


def _gpu_patch(old: Body, new: Body) -> Body:
    body = {}
    if (old["pools"], old["excludedTypes"]) != (new["pools"], new["excludedTypes"]):
        body = {"pools": new["pools"], "excludedTypes": new["excludedTypes"]}
    for field in ("count", "minCudaVersion", "allowedCudaVersions"):
        if old[field] != new[field]:
            body[field] = "" if new[field] is None else new[field]
    return body


def _changes(old: Body, new: Body, prefix: str) -> Iterator[Change]:
    for key in dict.fromkeys([*new, *old]):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) or isinstance(after, dict):
            yield from _changes(before or {}, after or {}, f"{prefix}{key}.")
        elif before != after and (before or after):  # an empty list is no change from nothing
            yield Change(prefix + key, before, after)


def _show(field: str, value: Any) -> str:
    if value is None:
        return "unset"
    if field.startswith("env.") and _SECRET.search(field) and "{{ RUNPOD_SECRET_" not in str(value):
        return "***"
    return repr(value)
