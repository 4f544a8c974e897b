"""RunPod on your machine, for development and tests: queue, load balancer, public API, worker processes.

with running("sentence-transformers") as endpoint:  # mode="http": behind the load balancer
    requests.post(endpoint.endpoint_url + "/runsync", json={"input": {...}}, headers={"Authorization": "x"})
"""

from local.containers import Container
from local.endpoint import Endpoint
from local.jobs import Rules
from local.load_balancer import LoadBalancer
from local.platform import Platform, running
from local.workers import WorkerFailed, WorkerProcess

__all__ = [
    "Container",
    "Endpoint",
    "LoadBalancer",
    "Platform",
    "Rules",
    "WorkerFailed",
    "WorkerProcess",
    "running",
]
