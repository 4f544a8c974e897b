"""RunPod on your machine, for development and tests: queue, load balancer, public API, worker processes.

with running("sentence-transformers") as platform:
    requests.post(platform.endpoint_url + "/runsync", json={"input": {...}}, headers={"Authorization": "x"})
"""

from local.containers import Container
from local.jobs import Rules
from local.platform import Platform, running
from local.workers import WorkerFailed, WorkerProcess

__all__ = ["Container", "Platform", "Rules", "WorkerFailed", "WorkerProcess", "running"]
