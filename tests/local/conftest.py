from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from local import Platform, Rules, running
from tests.helpers import wait_until

HANDLERS = Path(__file__).parent / "handlers"
# RunPod's own bounds for the deadlines are too long for a test.
RULES = Rules(
    ping_interval=1,
    missed_pings=6,
    execution_timeout_range=(0.1, 60),
    ttl_range=(0.1, 60),
    webhook_delay=0.1,
    restart_delay=0.1,
    grace=20,
)


class Client:
    """What curl would do."""

    def __init__(self, platform: Platform) -> None:
        self.platform = platform
        self.session = requests.Session()
        self.session.headers["Authorization"] = "Bearer any"

    def __call__(self, method: str, path: str, body: Any = None, **options: Any) -> requests.Response:
        url = f"{self.platform.endpoint_url}/{path}"
        return self.session.request(method, url, json=body, **{"timeout": 60, **options})

    def get(self, path: str) -> Any:
        return self("GET", path).json()

    def post(self, path: str, body: Any = None) -> Any:
        return self("POST", path, body).json()

    def run(self, **order: Any) -> str:
        """The id of a job that was queued."""
        return str(self.post("run", {"input": order})["id"])

    def runsync(self, **order: Any) -> Any:
        return self.post("runsync", {"input": order})

    def wait(self, name: str, *states: str, seconds: float = 120) -> Any:
        """The job once it is in one of `states`, or at its end."""
        final = ("COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT")
        jobs: list[Any] = []

        def there() -> bool:
            jobs.append(self.get(f"status/{name}"))
            return jobs[-1]["status"] in (states or final)

        wait_until(there, seconds)
        return jobs[-1]


def workers_health(**counts: int) -> dict[str, int]:
    """The `workers` of /health with these counts, else zero."""
    states = ("idle", "initializing", "ready", "running", "throttled", "unhealthy")
    return dict.fromkeys(states, 0) | counts


@pytest.fixture(scope="module")
def notes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the workers of this module note what happens to their jobs."""
    path = tmp_path_factory.mktemp("notes") / "notes"
    path.touch()
    return path


@pytest.fixture(scope="module")
def echo(notes: Path) -> Iterator[Client]:
    """One worker that takes 16 jobs at a time."""
    env = {"CONCURRENCY": "16", "NOTES": str(notes), "RUNPOD_LOG_LEVEL": "INFO"}
    env["HTTP_PROXY"] = "http://127.0.0.1:9"  # Nobody is there: what goes through it is lost.
    with running(HANDLERS / "echo.py", env=env, rules=RULES) as platform:
        yield Client(platform)
