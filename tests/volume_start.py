"""A worker's start as far as its model, in a process that tests may kill: python -m tests.volume_start NAME.

Says `ready`, waits for a line, and says as JSON what became of it. In the environment: TEST_HOST, the host it
takes itself to be on; TEST_STALE_S; TEST_LIMIT, the largest file in bytes that it may write; TEST_ROOMY, to
believe that every disk has room. After an error it tries once more, with a dead hub: `again` is the outcome.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import sys
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download  # noqa: F401  imports first, so that a start is quick

from shared import lock, volume
from shared.errors import StartError


def outcome(name: str) -> dict[str, Any]:
    try:
        model = volume.resolve_model(name)
    except StartError as error:
        return {"code": error.code, "message": error.message}
    except volume.HubUnreachable:
        return {"code": "unreachable"}
    return {"source": model.source, "path": str(model.path)}


if __name__ == "__main__":
    settings = os.environ
    if host := settings.get("TEST_HOST"):
        lock._host = lambda: host
    lock.STALE_S = float(settings.get("TEST_STALE_S", lock.STALE_S))
    lock.BEAT_S = min(lock.BEAT_S, lock.STALE_S / 10)
    if limit := settings.get("TEST_LIMIT"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
    if settings.get("TEST_ROOMY"):
        usage = shutil.disk_usage
        shutil.disk_usage = lambda path: usage(path)._replace(free=1 << 50)
    print("ready", flush=True)
    sys.stdin.readline()
    said = outcome(sys.argv[1])
    if "code" in said:
        volume.RETRY_S = ()
        os.environ["HF_ENDPOINT"] = "http://127.0.0.1:9"
        said["again"] = outcome(sys.argv[1])
    said["left"] = [str(path) for path in Path(settings["RUNPOD_VOLUME_PATH"]).rglob("blobs/*")]
    print(json.dumps(said), flush=True)
