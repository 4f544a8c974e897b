"""RunPod's cached models: the one thing that only the GraphQL API can set.

RunPod has announced the end of GraphQL for early 2027; REST v2 has no field for it yet. An endpoint with a
cached model is saved by GraphQL with all its fields each time, as RunPod's own SDK does.
"""

from __future__ import annotations

import re

from deploy.api import Api, ApiError, Body, Endpoint

MUTATION = "mutation ($input: EndpointInput!) { saveEndpoint(input: $input) { id } }"


def reference(model: str, revision: str | None) -> str:
    """RunPod's address of a model of the Hugging Face Hub. Raises ValueError unless `model` is owner/name."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        raise ValueError(f"cached_model needs a model of the Hugging Face Hub, as owner/name, not {model!r}")
    return f"https://huggingface.co/{model}:{revision or 'main'}"


def save(api: Api, body: Body, endpoint: str | None = None) -> Endpoint:
    """Create an endpoint with the `cachedModels` of `body`, or replace all of the one with the id `endpoint`.

    Raises ApiError; Unanswered when a new one may have been made nevertheless.
    """
    gpu, scaling, workers = body["gpu"], body["scaling"], body["workers"]
    fields = {
        "id": endpoint,
        "name": body["name"],
        "type": "LB" if body["type"] == "LOAD_BALANCER" else "QB",
        "gpuIds": ",".join([*gpu["pools"], *(f"-{name}" for name in gpu["excludedTypes"])]),
        "gpuCount": gpu["count"],
        "minCudaVersion": gpu["minCudaVersion"] or None,
        "allowedCudaVersions": ",".join(gpu["allowedCudaVersions"]) or None,
        "workersMin": workers["min"],
        "workersMax": workers["max"],
        "idleTimeout": workers.get("idleTimeout"),
        "scalerType": scaling["type"],
        "scalerValue": scaling.get("queueDelay", scaling.get("requestCount")),
        "executionTimeoutMs": body["timeout"],
        "flashBootType": body["flashboot"],
        "locations": ",".join(body["dataCenterIds"]),
        "networkVolumeIds": [{"networkVolumeId": volume} for volume in body["networkVolumes"]],
        "modelReferences": body["cachedModels"],
    }
    template = {
        "name": body["name"],
        "imageName": body["image"],
        "containerDiskInGb": body["disk"],
        "dockerArgs": body["args"],
        "ports": ",".join(body["ports"]),
        "env": [{"key": name, "value": value} for name, value in body["env"].items()],
        "containerRegistryAuthId": body["registry"],
    }
    order = {name: value for name, value in fields.items() if value is not None}
    order["template"] = {name: value for name, value in template.items() if value is not None}
    query = {"query": MUTATION, "variables": {"input": order}}
    answer = api.send("POST", "/graphql", query, makes=endpoint is None)
    if errors := answer.get("errors"):
        raise ApiError(f"RunPod refused the cached model: {errors[0]['message'].rstrip('.')}.")
    return api.endpoint(answer["data"]["saveEndpoint"]["id"])
