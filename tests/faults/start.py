"""A worker's start as far as its model, in a process that tests may kill: python -m tests.faults.start NAME.

Prints `ready`, waits for a line, and prints the outcome as JSON. In the environment: TEST_HOST, its host's
name; TEST_LEASE_S; TEST_LIMIT, the largest file in bytes that it may write; TEST_SPACE, to report space on
every disk. After an error there is a second attempt, with a dead hub, whose outcome is `again`.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import socket
import sys
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download  # noqa: F401  imports first, so that a start is quick

from shared import hub, volume
from shared.errors import StartError


def outcome(name: str) -> dict[str, Any]:
    try:
        model = volume.resolve_model(name)
    except StartError as error:
        return {"code": error.code, "message": error.message}
    except hub.HubUnreachable:
        return {"code": "unreachable"}
    return {"source": model.source, "path": str(model.path)}


if __name__ == "__main__":
    settings = os.environ
    if host := settings.get("TEST_HOST"):
        socket.gethostname = lambda: host
    volume.LEASE_S = float(settings.get("TEST_LEASE_S", volume.LEASE_S))
    if limit := settings.get("TEST_LIMIT"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
    if settings.get("TEST_SPACE"):
        usage = shutil.disk_usage
        shutil.disk_usage = lambda path: usage(path)._replace(free=1 << 50)
    print("ready", flush=True)
    sys.stdin.readline()
    result = outcome(sys.argv[1])
    if "code" in result:
        hub.RETRY_S = ()
        os.environ["HF_ENDPOINT"] = "http://127.0.0.1:9"
        result["again"] = outcome(sys.argv[1])
    result["left"] = [str(path) for path in Path(settings["RUNPOD_VOLUME_PATH"]).rglob("blobs/*")]
    print(json.dumps(result), flush=True)
